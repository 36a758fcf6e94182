"""How far figures of a histogram can be from the exact ones, computed from the histogram itself.

Between two bins the order of scores is known, so a curve (ROC, precision over recall) is exact at the borders of bins;
within a bin the pairs may lie in any order. A bin of which all scores are equal is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics.calibration import calibration_bin
from siamese_deploy.metrics.decisions import Decisions, decisions_at, decisions_from
from siamese_deploy.metrics.score_counts import ScoreCounts

Numbers = npt.NDArray[np.float64]


def bounds_of(counts: ScoreCounts, *, threshold: float, threshold_at_far: dict[float, float]) -> dict[str, float]:
    """Largest absolute error of each figure, rounding left out (1e-9). Errors of thresholds are not stated: they lie
    within the bin. For figures at the threshold: if both the exact one and this one are defined.

    Args:
        threshold_at_far: false accept rate -> the threshold found for it in these counts.
    """
    low, high = counts.ends
    same_pairs, different_pairs = counts.same_pairs, counts.different_pairs
    pairs = same_pairs + different_pairs
    blurred = high > low
    same, different = counts.same * blurred, counts.different * blurred  # of bins with several scores only
    straddles = calibration_bin(low) != calibration_bin(high)
    bounds = {
        "loss": _of_values(counts, lambda s: -np.maximum(_log(s), -100), lambda s: -np.maximum(_log(1 - s), -100)),
        "accuracy": 0.0,  # 0.5 has a bin of its own
        "best_accuracy": _best_accuracy(counts, same + different),
        "calibration/brier": _of_values(counts, lambda s: (1 - s) ** 2, lambda s: s**2),
        # Each of the pairs that may belong to the next bin moves its own error, at most 1, from one sum to another.
        "calibration/ece": 2 * int((counts.same + counts.different)[straddles].sum()) / pairs,
    }
    bounds |= _at_threshold(counts, threshold)
    if same_pairs and different_pairs:
        bounds["roc_auc"] = int((same * different).sum()) / (2 * same_pairs * different_pairs)
        bounds["average_precision"] = _average_precision(counts, blurred)
        bounds["eer"] = _equal_error_rate(counts, same, different)
    for far, found in threshold_at_far.items():
        # The exact threshold may accept part of the first bin that is one too many.
        bounds[f"tar_at_far/{far:g}"] = int(same[counts.first_accepted(found) - 1]) / same_pairs
    return bounds


def _log(values: Numbers) -> Numbers:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values), dtype=np.float64)


def _of_values(
    counts: ScoreCounts, of_same: Callable[[Numbers], Numbers], of_different: Callable[[Numbers], Numbers]
) -> float:
    """Of a mean over pairs of monotonic functions of their score."""
    low, high = counts.ends
    total = 0.0
    for number, function in ((counts.same, of_same), (counts.different, of_different)):
        at_mean = function(counts.scores)
        worst = np.maximum(np.abs(function(low) - at_mean), np.abs(function(high) - at_mean))
        total += float((number * worst).sum())
    return total / (counts.same_pairs + counts.different_pairs)


def _best_accuracy(counts: ScoreCounts, undecided: npt.NDArray[np.int64]) -> float:
    """A threshold within a bin decides at best all its pairs rightly, the rest as one at its border does."""
    right = counts.same_accepted + counts.different_pairs - counts.different_accepted
    # right[k + 1]: bin k is rejected, so its different pairs are among the right ones already
    within = right[1:] + counts.same
    best = int(right[:-1].max()) if counts.scores[-1] == 1 else int(right.max())
    possible = int(within[undecided > 0].max(initial=best))
    return (possible - best) / (counts.same_pairs + counts.different_pairs)


def _average_precision(counts: ScoreCounts, blurred: npt.NDArray[np.bool_]) -> float:
    """The same pairs of a bin may all come before its different pairs, or all after them."""
    same_above, different_above = counts.same_accepted[1:][blurred], counts.different_accepted[1:][blurred]
    same, different = counts.same[blurred], counts.different[blurred]
    has_same = same > 0
    same, different = same[has_same], different[has_same]
    same_above, different_above = same_above[has_same], different_above[has_same]
    taken = (same_above + same) / (same_above + same + different_above + different)
    most = (same_above + same) / (same_above + same + different_above)
    least = (same_above + 1) / (same_above + 1 + different_above + different)
    errors = [float((same * error).sum()) for error in (most - taken, taken - least)]
    return max(errors) / counts.same_pairs


def _equal_error_rate(counts: ScoreCounts, same: npt.NDArray[np.int64], different: npt.NDArray[np.int64]) -> float:
    """FAR falls and 1 - TAR rises with the threshold: they cross in the last bin from whose lower border on FAR is not
    the smaller one.
    """
    rejected = counts.same_pairs - counts.same_accepted[:-1]
    not_smaller = counts.different_accepted[:-1] * counts.same_pairs >= rejected * counts.different_pairs
    crossing = int(np.flatnonzero(not_smaller)[-1])  # the first bin is one: at its border all pairs are accepted
    return max(int(different[crossing]) / counts.different_pairs, int(same[crossing]) / counts.same_pairs) / 2


def _at_threshold(counts: ScoreCounts, threshold: float) -> dict[str, float]:
    """Each figure grows or falls with the true and the false accepts, so its extremes lie where those have theirs."""
    low, high = counts.ends
    ours = decisions_at(counts, threshold)
    cut = np.flatnonzero((low < threshold) & (threshold <= high))
    possible = [ours]
    if len(cut):
        rejecting, accepting = (decisions_from(counts, int(cut[0]) + k) for k in (1, 0))
        ends = (rejecting, accepting)
        possible += [
            Decisions(a.true_accepts, b.false_accepts, b.true_rejects, a.false_rejects)
            for a, b in product(ends, repeat=2)
        ]
    bounds = {}
    for name in ("accuracy", "precision", "recall", "f1", "mcc", "far"):
        value = getattr(ours, name)
        if value is None:
            continue
        others = [getattr(decisions, name) for decisions in possible]
        # Where Matthews' coefficient is undefined, its neighbours tend to 0.
        others = [0.0 if other is None and name == "mcc" else other for other in others]
        bounds[f"at_threshold/{name}"] = max(abs(other - value) for other in others if other is not None)
    return bounds
