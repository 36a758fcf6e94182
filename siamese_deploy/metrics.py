"""Scores + is_same -> numbers. Two arrays in, numbers or a frozen dataclass out.

FAR, the false accept rate, is the share of different pairs that are accepted (score >= threshold); TAR, the true accept
rate, the share of same pairs that are. ISO/IEC 19795-1 calls them false match rate and 1 - false non-match rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import InputDataError, IntegrityError
from siamese_deploy.verifier import Scores


@dataclass(frozen=True)
class VerificationMetrics:
    pairs: int
    same_pairs: int
    loss: float
    """Binary cross entropy (1 = same), mean over pairs, in nats."""
    accuracy: float
    """Share of pairs decided rightly at `threshold`, in [0, 1]."""
    roc_auc: float | None
    """Area under the ROC curve in [0, 1]; None where one kind of pair is missing."""
    threshold: float
    """A pair is accepted as "same" when score >= threshold."""


def verification_metrics(
    scores: Scores, is_same: npt.NDArray[np.bool_], *, threshold: float = 0.5
) -> VerificationMetrics:
    """Metrics of (P,) scores in [0, 1] against (P,) truth.

    Raises:
        IntegrityError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise IntegrityError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; the model is damaged")
    return VerificationMetrics(
        pairs=len(scores),
        same_pairs=int(is_same.sum()),
        loss=binary_cross_entropy(scores, is_same),
        accuracy=float(np.mean((scores >= threshold) == is_same)),
        roc_auc=roc_auc(scores, is_same),
        threshold=threshold,
    )


def binary_cross_entropy(scores: Scores, is_same: npt.NDArray[np.bool_]) -> float:
    """Mean of -log(score) over same pairs and -log(1 - score) over different ones.

    Logarithms are cut at -100 as torch.nn.BCELoss does, so a confident mistake costs 100 and not infinity.
    """
    probability_of_truth = np.where(is_same, scores.astype(np.float64), 1.0 - scores.astype(np.float64))
    with np.errstate(divide="ignore"):
        return float(np.mean(-np.maximum(np.log(probability_of_truth), -100.0)))


def roc_auc(scores: Scores, is_same: npt.NDArray[np.bool_]) -> float | None:
    """Probability that a random same pair scores above a random different pair, ties counted half.

    This is the Mann-Whitney U statistic divided by the number of (same, different) combinations; see Fawcett,
    "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006).
    """
    n_same = int(is_same.sum())
    n_different = len(is_same) - n_same
    if n_same == 0 or n_different == 0:
        return None
    _, group, group_size = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(group_size) - (group_size - 1) / 2  # 1-based, tied scores share their mean rank
    rank_sum = float(mid_rank[group][is_same].sum())
    return (rank_sum - n_same * (n_same + 1) / 2) / (n_same * n_different)


MIN_FALSE_ACCEPTS = 10
"""A FAR is only stated where so many different pairs may be accepted: fewer, and one pair more or less decides it."""


@dataclass(frozen=True)
class OperatingPoint:
    threshold: float
    """Accept from this score on."""
    far: float
    """False accept rate at it, in [0, 1]."""
    tar: float
    """True accept rate at it, in [0, 1]."""


def operating_point(scores: Scores, is_same: npt.NDArray[np.bool_], far: float) -> OperatingPoint:
    """The lowest threshold at which at most the share `far` of different pairs is accepted.

    The threshold lies half-way between the highest score that must be rejected and the next higher score of any pair
    (1 if there is none), so that rounding on another provider moves no pair across it.

    Raises:
        InputDataError: no same pair, fewer different pairs than MIN_FALSE_ACCEPTS / far, or a larger share of them than
            `far` with a score of 1.
    """
    different = np.sort(scores[~is_same].astype(np.float64))[::-1]
    same = scores[is_same].astype(np.float64)
    needed = different_pairs_needed(far)
    if len(different) < needed or len(same) == 0:
        raise InputDataError(
            f"a false accept rate of {far:g} needs {needed:,} different pairs (so that {MIN_FALSE_ACCEPTS} may be "
            f"accepted) and a same pair, got {len(different):,} and {len(same):,}; add pictures or choose a higher rate"
        )
    rejected = different[int(far * len(different) + 1e-9)]  # the first that is one too many
    above = scores[scores > np.float32(rejected)].astype(np.float64)
    threshold = float((rejected + (above.min() if len(above) else 1.0)) / 2)
    if threshold <= rejected:
        raise InputDataError(
            f"more different pairs than a false accept rate of {far:g} allows have a score of 1; the network confuses "
            "them, and no threshold tells them apart"
        )
    return OperatingPoint(threshold, float(np.mean(different >= threshold)), float(np.mean(same >= threshold)))


def different_pairs_needed(far: float) -> int:
    return math.ceil(MIN_FALSE_ACCEPTS / far - 1e-9)


def equal_error_rate(scores: Scores, is_same: npt.NDArray[np.bool_]) -> OperatingPoint | None:
    """The point at which the share of same pairs rejected comes nearest to that of different pairs accepted.

    The equal error rate is the mean of the two shares there: (point.far + 1 - point.tar) / 2. None where one kind of
    pair is missing.
    """
    if is_same.all() or not is_same.any():
        return None
    different, same = np.sort(scores[~is_same]), np.sort(scores[is_same])
    thresholds = np.unique(scores)
    far = 1 - np.searchsorted(different, thresholds, side="left") / len(different)
    tar = 1 - np.searchsorted(same, thresholds, side="left") / len(same)
    best = int(np.argmin(np.abs(far - (1 - tar))))
    return OperatingPoint(float(thresholds[best]), float(far[best]), float(tar[best]))
