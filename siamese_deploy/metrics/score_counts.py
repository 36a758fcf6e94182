"""Scores + is_same -> how many pairs of each kind have which score: all that the metrics need to know.

Exact (`ScoreCounts.of`, the scores in memory) or streaming (`ScoreHistogram`, for 10^8 pairs and more); one
implementation of the metrics serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import IntegrityError
from siamese_deploy.verifier import Scores


@dataclass(frozen=True)
class ScoreCounts:
    """Counts are exact up to 2 * 10^9 pairs of each kind."""

    scores: npt.NDArray[np.float64]
    """(n,) ascending, distinct, in [0, 1]. Of a histogram: the mean score of each bin that is not empty."""
    same: npt.NDArray[np.int64]
    """(n,) same pairs with that score."""
    different: npt.NDArray[np.int64]
    """(n,) different pairs with that score."""
    exact: bool = True
    """False: from a histogram."""
    low: npt.NDArray[np.float64] | None = None
    """(n,) lowest score in each bin of a histogram; None: that is `scores`."""
    high: npt.NDArray[np.float64] | None = None
    """(n,) highest score in each bin of a histogram; None: that is `scores`."""

    @classmethod
    def of(cls, scores: Scores, is_same: npt.NDArray[np.bool_]) -> ScoreCounts:
        """Count (P,) scores with their (P,) truth.

        Raises:
            IntegrityError: a score is NaN or outside [0, 1].
        """
        # Bits of a float32 that is not negative sort as its value; the lowest bit of the key tells the kind of pair.
        key = _bits(_checked(scores)).astype(np.int64) << 1 | is_same
        key.sort()
        first = np.flatnonzero(np.diff(key >> 1, prepend=-1))
        total = np.diff(first, append=len(key))
        same = np.add.reduceat(key & 1, first) if len(key) else total
        return cls((key[first] >> 1).astype(np.uint32).view(np.float32).astype(np.float64), same, total - same)

    @property
    def ends(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(n,) lowest and (n,) highest score of the pairs counted together."""
        return self.scores if self.low is None else self.low, self.scores if self.high is None else self.high

    @cached_property
    def same_pairs(self) -> int:
        return int(self.same.sum())

    @cached_property
    def different_pairs(self) -> int:
        return int(self.different.sum())

    @cached_property
    def same_accepted(self) -> npt.NDArray[np.int64]:
        """(n + 1,) same pairs with a score of scores[k] or higher; the last number, of a threshold above all, is 0."""
        return _sums_from_the_top(self.same)

    @cached_property
    def different_accepted(self) -> npt.NDArray[np.int64]:
        """(n + 1,) different pairs with a score of scores[k] or higher; the last number is 0."""
        return _sums_from_the_top(self.different)

    def first_accepted(self, threshold: float) -> int:
        """Index of the lowest score that is accepted at `threshold`; n if none is."""
        return int(np.searchsorted(self.scores, threshold, side="left"))


_MANTISSA_BITS = 14
"""2^14 bins to each power of two."""
_SHIFT = 23 - _MANTISSA_BITS
_LAST_STEP = np.uint16(2**_SHIFT - 1)
_HALF = 0x3F000000  # bits of 0.5
_LEAST_REST = 0x33800000  # bits of 2^-24, the least 1 - score above 0: float32 has no score nearer to 1
_LOWER = (_HALF >> _SHIFT) + 1
_UPPER = (_HALF >> _SHIFT) - (_LEAST_REST >> _SHIFT) + 1
_BINS = _LOWER + _UPPER
_PIECE = 1 << 18  # scores at a time, so that what is needed besides the bins stays small


class ScoreHistogram:
    """Counts of any number of scores in 70 MB: 2,441,218 fixed bins, none of them wider than 2^-14 of its distance to
    the nearer end of [0, 1]. Scores of 0 and of 0.5, and each score above 1 - 2^-9, have a bin of their own.

    A bin knows its pairs of each kind, its lowest and highest score and their mean. All are whole numbers, so the order
    in which scores are added changes nothing, not even a last digit.
    """

    def __init__(self) -> None:
        self._pairs = np.zeros(2 * _BINS, np.int64)  # of bin k: different at 2 k, same at 2 k + 1
        self._steps = np.zeros(_BINS, np.int64)  # sum over pairs of the float32 steps from the bin's end nearer 0 or 1
        self._most = np.zeros(_BINS, np.uint16)  # in such steps
        self._least = np.zeros(_BINS, np.uint16)  # the same, counted from the bin's other end

    def add(self, scores: Scores, is_same: npt.NDArray[np.bool_]) -> None:
        """Count (P,) scores with their (P,) truth. Nothing is counted if it raises.

        Raises:
            IntegrityError: a score is NaN or outside [0, 1].
        """
        checked = _checked(scores)
        for first in range(0, len(checked), _PIECE):
            piece, kind = checked[first : first + _PIECE], is_same[first : first + _PIECE]
            upper = piece > 0.5
            bits = _bits(np.where(upper, np.float32(1) - piece, piece))  # 1 - s is exact for s in [0.5, 1]
            bins = (bits >> _SHIFT).astype(np.int64)
            rest = np.maximum(bins - (_LEAST_REST >> _SHIFT) + 1, 0)
            bins = np.where(upper, _BINS - 1 - rest, bins)
            steps = (bits & _LAST_STEP).astype(np.uint16)
            np.add.at(self._pairs, 2 * bins + kind, 1)
            np.add.at(self._steps, bins, steps.astype(np.int64))
            np.maximum.at(self._most, bins, steps)
            np.maximum.at(self._least, bins, _LAST_STEP - steps)

    def counts(self) -> ScoreCounts:
        """What was added so far."""
        pairs = self._pairs.reshape(-1, 2)
        used = np.flatnonzero(pairs[:, 0] | pairs[:, 1])
        different, same = pairs[used].T.copy()
        mean = _scores_in(used, self._steps[used] / (different + same))
        ends = (_scores_in(used, _LAST_STEP - self._least[used]), _scores_in(used, self._most[used]))
        low, high = np.minimum(*ends), np.maximum(*ends)
        return ScoreCounts(mean, same, different, exact=False, low=low, high=high)


def _scores_in(
    bins: npt.NDArray[np.int64], steps: npt.NDArray[np.float64] | npt.NDArray[np.uint16]
) -> npt.NDArray[np.float64]:
    """Scores so many (also fractions of) float32 steps from the beginning of each bin."""
    upper = bins >= _LOWER
    rest = _BINS - 1 - bins
    coarse = np.where(upper, np.where(rest > 0, rest - 1 + (_LEAST_REST >> _SHIFT), 0), bins)
    bits = (coarse << _SHIFT).astype(np.uint32)
    begin = bits.view(np.float32).astype(np.float64)
    step = (bits + np.uint32(1)).view(np.float32).astype(np.float64) - begin
    distance: npt.NDArray[np.float64] = begin + step * steps
    return np.where(upper, 1 - distance, distance)


def _checked(scores: Scores) -> Scores:
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    bad = len(scores) - int(((scores >= 0) & (scores <= 1)).sum())  # NaN is neither
    if bad:
        raise IntegrityError(
            f"{bad:,} of {len(scores):,} scores are NaN or outside [0, 1]; the model is damaged", code="not-finite"
        )
    return scores


def _bits(scores: Scores) -> npt.NDArray[np.uint32]:
    positive: Scores = scores + np.float32(0)  # 0 of -0
    return positive.view(np.uint32)


def _sums_from_the_top(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.append(np.cumsum(counts[::-1])[::-1], 0)
