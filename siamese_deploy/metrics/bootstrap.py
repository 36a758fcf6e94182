"""How far the metrics would differ for another draw of the classes: 95 % intervals, and differences of two models.

Pairs are not independent: one odd class spoils all pairs it is in. So classes are drawn, with replacement, and not
pairs: the subsets bootstrap of Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems - the subsets
bootstrap", Computer Vision and Image Understanding 93 (2004), with the class as the subset. A class that was drawn m
times brings its inner pairs m times; the pairs of classes a and b come m_a * m_b times. Intervals are percentiles
(Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

Of n classes, a pair of two classes so comes (1 - 1 / n) times on average and a pair within a class once. Pairs within a
class are therefore weighted by (1 - 1 / n): figures depend on the share of same pairs (accuracy, average precision).

Only `RandomState.random_sample` is drawn from, and all counts are whole numbers: the same pairs give the same
replicates on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics.figures import FALSE_ACCEPT_RATES, REFERENCE_THRESHOLD, different_pairs_needed
from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.verifier import Scores

METHOD = "percentile bootstrap over classes"
LEVEL = 0.95
REPLICATES = 1000
MIN_REPLICATES = 200
MIN_CLASSES = 4
"""Of two classes, say, every draw with pairs of both kinds is the same one, and the interval would have no width."""
FULL_PAIRS = 10**6
"""Up to so many pairs all replicates are computed; of n times as many pairs, one in n of them."""

Integers: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = npt.NDArray[np.float64]
ClassedScores: TypeAlias = tuple[Integers, Integers, npt.NDArray[np.bool_], Scores]
"""left_class, right_class, is_same, scores, each (P,); classes are numbered from 0."""

_TAIL = np.logspace(-6, 0, 1024)
_QUANTILES = np.linspace(0, 1, 768)
_MAX_DISTINCT = 4096
_HELD_CELLS = 1 << 19
_ROWS, _REPLICATES_AT_A_TIME = 1 << 13, 32  # 2 MiB of float64: stays in a core's cache


@dataclass(frozen=True)
class Replicates:
    """A figure's values in resampled data. Names: accuracy, roc_auc, average_precision, eer, tar_at_far/0.1 (0.01 ...),
    at_threshold/accuracy, at_threshold/recall, at_threshold/far.
    """

    values: dict[str, Numbers]
    """Name -> (replicates,) values; NaN in a replicate in which the figure is undefined."""
    replicates: int
    classes: int
    seed: int
    reason: str | None = None
    """Why there are none, in one line."""

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % interval from the replicates in which the figure is defined; None if those are fewer than half."""
        values = self.values.get(name, np.empty(0))
        defined = values[~np.isnan(values)]
        if 2 * len(defined) < self.replicates or len(defined) == 0:
            return None
        low, high = np.percentile(defined, _PERCENTILES)
        return float(low), float(high)

    def undefined(self, name: str) -> int:
        """Number of replicates that the interval leaves out."""
        return int(np.isnan(self.values[name]).sum()) if name in self.values else self.replicates


_PERCENTILES = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)


def replicates_for(pairs: int, replicates: int = REPLICATES) -> int:
    """Fewer for many pairs, MIN_REPLICATES at least, so that the time stays bounded by that of scoring."""
    return min(replicates, max(MIN_REPLICATES, replicates * FULL_PAIRS // max(pairs, FULL_PAIRS)))


def bootstrap(
    chunks: Callable[[], Iterable[ClassedScores]],
    counts: ScoreCounts,
    n_classes: int,
    *,
    threshold: float,
    seed: int = 1,
    replicates: int = REPLICATES,
) -> Replicates:
    """Resample the classes and compute the figures anew.

    Runs with the same seed and n_classes draw the same classes, so two models on the same pairs can be compared
    replicate by replicate (`paired_difference`). Up to 4,096 distinct scores each keep a bin of their own; more are put
    into bins of at most about 0.13 % of either kind of pair, finer towards the tails that decide errors. Memory: at
    most about 200 MB and 1 kB a class, however many pairs there are.

    Args:
        chunks: gives all pairs; called once.
        counts: of the same pairs.
        threshold: the operating one.
    """
    if n_classes < MIN_CLASSES:
        reason = f"needs pairs of at least {MIN_CLASSES} classes, got {n_classes}: resampling so few tells nothing"
        return Replicates({}, 0, n_classes, seed, reason)
    pairs = counts.same_pairs + counts.different_pairs
    drawn = _times_drawn(n_classes, replicates_for(pairs, replicates), seed)
    edges = _edges(counts, threshold)
    sums = np.zeros((2 * len(edges), drawn.shape[1]))
    for codes, number in _cells(chunks(), edges, n_classes):
        _add_weights(sums, codes, number, drawn)
    by_kind = sums.reshape(len(edges), 2, -1)
    parts = [
        _figures(
            by_kind[:, 1, k : k + _REPLICATES_AT_A_TIME],
            by_kind[:, 0, k : k + _REPLICATES_AT_A_TIME],
            edges,
            threshold,
        )
        for k in range(0, drawn.shape[1], _REPLICATES_AT_A_TIME)
    ]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for far in FALSE_ACCEPT_RATES:
        if counts.different_pairs < different_pairs_needed(far):
            values[f"tar_at_far/{far:g}"][:] = np.nan  # as in the metrics: so few pairs cannot say
    return Replicates(values, drawn.shape[1], n_classes, seed)


@dataclass(frozen=True)
class Difference:
    """Of a figure: the second run's minus the first's."""

    low: float
    high: float
    """Ends of the 95 % interval."""
    p_value: float
    """Two-sided, of "both are equally good"; at least 2 / (replicates + 1)."""


def paired_difference(first: Replicates, second: Replicates, name: str) -> Difference | None:
    """Both of the same pairs, number of classes and seed. None where one of them has no interval.

    p is twice the smaller share of replicates in which the difference is at most 0, or at least 0, one more counted in
    (Davison and Hinkley, "Bootstrap Methods and their Application" (1997), 4.2).
    """
    if (first.classes, first.seed, first.replicates) != (second.classes, second.seed, second.replicates):
        raise ValueError("replicates of different classes, seeds or numbers of pairs cannot be paired")
    if first.interval(name) is None or second.interval(name) is None:
        return None
    change = second.values[name] - first.values[name]
    change = change[~np.isnan(change)]
    if len(change) == 0:
        return None
    low, high = np.percentile(change, _PERCENTILES)
    opposed = min(int((change <= 0).sum()), int((change >= 0).sum()))
    return Difference(float(low), float(high), min(2 * (opposed + 1) / (len(change) + 1), 1.0))


def _times_drawn(n_classes: int, replicates: int, seed: int) -> npt.NDArray[np.uint8]:
    """(n_classes + 1, replicates) how often each class was drawn; the last row, of ones, stands for "no second class".

    A uint8 holds it: none is drawn more than n_classes times, and of 256 and more none comes near 256 times.
    """
    random = np.random.RandomState(seed)
    drawn = np.ones((n_classes + 1, replicates), np.uint8)
    for replicate in range(replicates):  # row by row: the first ones are the same however many there are
        chosen = (random.random_sample(n_classes) * n_classes).astype(np.int64)
        drawn[:-1, replicate] = np.bincount(chosen, minlength=n_classes)
    return drawn


def _edges(counts: ScoreCounts, threshold: float) -> Numbers:
    """(K,) ascending; bin k holds the scores from edges[k] to below edges[k + 1].

    All distinct scores if they are few. Otherwise quantiles of both kinds, and shares down to 10^-6 of the tails that
    decide errors: the highest different pairs and the lowest same ones. Both thresholds are edges, and so is the
    highest score: nothing rejects a score of 1.
    """
    scores = counts.scores
    if len(scores) > _MAX_DISTINCT:
        same, different = counts.same_accepted, counts.different_accepted
        wanted = [(same, 1 - _QUANTILES), (same, 1 - _TAIL), (different, _QUANTILES), (different, _TAIL)]
        # The first score from which on at most the share is accepted.
        chosen = [np.searchsorted(-accepted, -(shares * accepted[0])) for accepted, shares in wanted]
        chosen.append(np.searchsorted(-different, [0]))
        scores = scores[np.minimum(np.concatenate(chosen), len(scores) - 1)]
    return np.unique(np.concatenate([[0.0, REFERENCE_THRESHOLD, threshold, counts.scores[-1]], scores]))


def _cells(chunks: Iterable[ClassedScores], edges: Numbers, n_classes: int) -> Iterable[tuple[Integers, Integers]]:
    """Pairs that no replicate tells apart, of the same bin, kind and two classes, as one number: (cells,) sorted codes
    and how many pairs each stands for. Codes are (2 * bin + is_same) * n_classes^2 + class * n_classes + class.

    With few classes there are few cells however many pairs; with many they come in several parts.
    """
    waiting: list[Integers] = []
    held = (np.empty(0, np.int64), np.empty(0, np.int64))
    for left, right, is_same, scores in chunks:
        bins = np.searchsorted(edges, scores.astype(np.float64), side="right") - 1
        codes = (2 * bins + is_same) * n_classes + np.minimum(left, right)
        waiting.append(codes * n_classes + np.maximum(left, right))
        if sum(map(len, waiting)) >= _HELD_CELLS:
            held = _merged(held, waiting)
            waiting = []
            if len(held[0]) >= _HELD_CELLS:
                yield held
                held = (np.empty(0, np.int64), np.empty(0, np.int64))
    if waiting:
        held = _merged(held, waiting)
    if len(held[0]):
        yield held


def _merged(held: tuple[Integers, Integers], waiting: list[Integers]) -> tuple[Integers, Integers]:
    codes, numbers = np.unique(np.concatenate(waiting), return_counts=True)
    if len(held[0]) == 0:
        return codes, numbers
    both, numbers = np.concatenate([held[0], codes]), np.concatenate([held[1], numbers])
    order = np.argsort(both, kind="stable")
    first = np.flatnonzero(np.diff(both[order], prepend=-1))
    return both[order][first], np.add.reduceat(numbers[order], first)


def _add_weights(sums: Numbers, codes: Integers, number: Integers, drawn: npt.NDArray[np.uint8]) -> None:
    """Add to sums[2 * bin + is_same, replicate] how often the pairs of the cells come in that replicate."""
    n_classes = len(drawn) - 1
    rest, b = np.divmod(codes, n_classes)
    row, a = np.divmod(rest, n_classes)
    within = a == b
    b[within] = n_classes  # pairs within a class come as often as the class, not as its square
    # The weights 1 and 1 - 1 / n, n times as large: whole numbers, so that sums are exact.
    number = number * np.where(within, n_classes - 1, n_classes)
    for k in range(0, drawn.shape[1], _REPLICATES_AT_A_TIME):
        times = drawn[:, k : k + _REPLICATES_AT_A_TIME].astype(np.float64)  # exact up to 2^53
        for start in range(0, len(codes), _ROWS):
            here = slice(start, start + _ROWS)
            weights = times[a[here]]
            weights *= times[b[here]]
            weights *= number[here, None]
            first = np.flatnonzero(np.diff(row[here], prepend=-1))
            sums[row[here][first], k : k + _REPLICATES_AT_A_TIME] += np.add.reduceat(weights, first, axis=0)


def _figures(same: Numbers, different: Numbers, edges: Numbers, threshold: float) -> dict[str, Numbers]:
    """(bins, replicates) counts -> name -> (replicates,) values; definitions are those of `metrics`."""
    same_accepted, different_accepted = (np.cumsum(kind[::-1], axis=0)[::-1] for kind in (same, different))
    n_same, n_different = same_accepted[0], different_accepted[0]
    at_half, at_threshold = (int(np.searchsorted(edges, t)) for t in (REFERENCE_THRESHOLD, threshold))
    accepted = same_accepted + different_accepted
    with np.errstate(divide="ignore", invalid="ignore"):
        far, rejected_same = different_accepted / n_different, 1 - same_accepted / n_same
        precision = np.divide(same_accepted, accepted, out=np.zeros_like(accepted), where=accepted > 0)
        crossing = np.argmin(np.abs(different_accepted * n_same - (n_same - same_accepted) * n_different), axis=0)
        replicate = np.arange(len(n_same))
        figures = {
            "roc_auc": (same * (n_different - different_accepted + different / 2)).sum(axis=0) / (n_same * n_different),
            "average_precision": (same * precision).sum(axis=0) / n_same,
            "eer": (far + rejected_same)[crossing, replicate] / 2,
            "at_threshold/recall": same_accepted[at_threshold] / n_same,
            "at_threshold/far": far[at_threshold],
        }
        for name, first in (("accuracy", at_half), ("at_threshold/accuracy", at_threshold)):
            right = same_accepted[first] + n_different - different_accepted[first]
            figures[name] = right / accepted[0]
        of_none = np.full(len(n_same), np.nan if edges[-1] == 1 else 0.0)  # nothing rejects a score of 1
        tar = np.vstack([same_accepted / n_same, of_none])
        for rate in FALSE_ACCEPT_RATES:
            first_allowed = (different_accepted > np.floor(rate * n_different + 1e-9)).sum(axis=0)
            figures[f"tar_at_far/{rate:g}"] = tar[first_allowed, replicate]
    one_kind = (n_same == 0) | (n_different == 0)
    for name in figures:
        if not name.endswith("accuracy") and not name.startswith("at_threshold"):
            figures[name][one_kind] = np.nan
    return figures
