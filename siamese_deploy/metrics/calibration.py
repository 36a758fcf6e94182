"""Scores read as probabilities of "same": how far they can be believed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics.score_counts import ScoreCounts

BINS = 15
"""Of equal width, as Guo et al. take."""


@dataclass(frozen=True)
class CalibrationBin:
    """One point of the reliability curve. A score belongs here if low < score <= high; 0 belongs to the first bin."""

    low: float
    high: float
    pairs: int
    mean_score: float
    same_share: float
    """Share of the pairs that are same; equal to mean_score if the scores are calibrated."""


@dataclass(frozen=True)
class Calibration:
    brier: float
    """Mean of (score - truth)^2, truth 1 for same and 0 for different; in [0, 1], 0 is best. Brier, "Verification of
    forecasts expressed in terms of probability", Monthly Weather Review 78 (1950), in the usual form for two outcomes.
    """
    expected_calibration_error: float
    """Mean of |same_share - mean_score| over the bins, weighted by their pairs; in [0, 1], 0 is best. Guo, Pleiss, Sun
    and Weinberger, "On calibration of modern neural networks", ICML 2017.
    """
    bins: tuple[CalibrationBin, ...]
    """The reliability curve; bins without pairs are left out."""


def calibration(counts: ScoreCounts) -> Calibration:
    """Of at least one pair."""
    total = counts.same + counts.different
    n_pairs = int(total.sum())
    squares = counts.same * (1 - counts.scores) ** 2 + counts.different * counts.scores**2
    of_bin = calibration_bin(counts.scores)
    pairs, same, score_sum = (
        np.bincount(of_bin, weights, minlength=BINS) for weights in (total, counts.same, total * counts.scores)
    )
    edges = _edges().tolist()
    return Calibration(
        brier=float(squares.sum()) / n_pairs,
        expected_calibration_error=float(np.abs(same - score_sum).sum()) / n_pairs,
        bins=tuple(
            CalibrationBin(
                low=edges[k],
                high=edges[k + 1],
                pairs=int(pairs[k]),
                mean_score=float(score_sum[k] / pairs[k]),
                same_share=float(same[k] / pairs[k]),
            )
            for k in np.flatnonzero(pairs).tolist()
        ),
    )


def calibration_bin(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """(n,) scores -> (n,) index of their bin, from 0."""
    return np.searchsorted(_edges()[1:-1], scores, side="left").astype(np.int64)


def _edges() -> npt.NDArray[np.float64]:
    return np.arange(BINS + 1) / BINS
