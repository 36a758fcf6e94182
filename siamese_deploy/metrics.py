"""Scores + is_same -> numbers. Two arrays in, a frozen dataclass out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import IntegrityError
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
