"""Pairs decided at one threshold: the four counts and what is computed from them.

"Positive" of the literature is "same" here. Sources: Fawcett, "An introduction to ROC analysis", Pattern Recognition
Letters 27 (2006), for all but the coefficient of Matthews, Biochimica et Biophysica Acta 405 (1975).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics.score_counts import ScoreCounts


def accepted(scores: npt.NDArray[np.floating], threshold: float) -> npt.NDArray[np.bool_]:
    """(P,) scores -> (P,) True where score >= threshold, both as float64.

    The one rule for every file and picture. NumPy would round a threshold such as 0.385, which is no float32, before it
    compares it with float32 scores, and a plain Python comparison of the same two numbers would not.
    """
    return np.asarray(scores, dtype=np.float64) >= threshold


@dataclass(frozen=True)
class Decisions:
    """Counts of pairs. What divides by zero is None."""

    true_accepts: int
    """Same pairs accepted."""
    false_accepts: int
    """Different pairs accepted."""
    true_rejects: int
    """Different pairs rejected."""
    false_rejects: int
    """Same pairs rejected."""

    @property
    def accuracy(self) -> float:
        """Share of pairs decided rightly."""
        right = self.true_accepts + self.true_rejects
        return right / (right + self.false_accepts + self.false_rejects)

    @property
    def precision(self) -> float | None:
        """Share of accepted pairs that are same; None where none is accepted."""
        return _ratio(self.true_accepts, self.true_accepts + self.false_accepts)

    @property
    def recall(self) -> float | None:
        """Share of same pairs that are accepted, the true accept rate; None without same pairs."""
        return _ratio(self.true_accepts, self.true_accepts + self.false_rejects)

    @property
    def far(self) -> float | None:
        """Share of different pairs that are accepted, the false accept rate; None without different pairs."""
        return _ratio(self.false_accepts, self.false_accepts + self.true_rejects)

    @property
    def f1(self) -> float | None:
        """2 TA / (2 TA + FA + FR), the harmonic mean of precision and recall; None without same or accepted pairs."""
        return _ratio(2 * self.true_accepts, 2 * self.true_accepts + self.false_accepts + self.false_rejects)

    @property
    def mcc(self) -> float | None:
        """(TA TR - FA FR) / sqrt((TA + FA) (TA + FR) (TR + FA) (TR + FR)), in [-1, 1]; 0 is chance.

        None where one kind of pair is missing, or all pairs are decided alike.
        """
        ta, fa, tr, fr = self.true_accepts, self.false_accepts, self.true_rejects, self.false_rejects
        product = (ta + fa) * (ta + fr) * (tr + fa) * (tr + fr)
        return (ta * tr - fa * fr) / math.sqrt(product) if product else None


def decisions_at(counts: ScoreCounts, threshold: float) -> Decisions:
    """Accept when score >= threshold."""
    return decisions_from(counts, counts.first_accepted(threshold))


def decisions_from(counts: ScoreCounts, first: int) -> Decisions:
    """Accept counts.scores[first] and all above it."""
    same, different = int(counts.same_accepted[first]), int(counts.different_accepted[first])
    return Decisions(same, different, counts.different_pairs - different, counts.same_pairs - same)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
