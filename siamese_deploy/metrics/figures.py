"""Scores + is_same -> numbers; docs/metrics.md explains each to its reader.

FAR, the false accept rate, is the share of different pairs that are accepted (score >= threshold); TAR, the true accept
rate, the share of same pairs that are. ISO/IEC 19795-1 calls them false match rate and 1 - false non-match rate.

Everything is computed from a `ScoreCounts`, by whole numbers as far as it goes: exact with ties, and the same whether
the scores lie in memory or went through a histogram. Of a histogram, `bounds` says how far a figure can be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import InputDataError
from siamese_deploy.metrics.bounds import bounds_of
from siamese_deploy.metrics.calibration import Calibration, calibration
from siamese_deploy.metrics.decisions import Decisions, decisions_at, decisions_from
from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.verifier import Scores

FALSE_ACCEPT_RATES = (0.1, 0.01, 0.001, 0.0001)
MIN_FALSE_ACCEPTS = 10
"""A FAR is only stated where so many different pairs may be accepted: fewer, and one pair more or less decides it."""
REFERENCE_THRESHOLD = 0.5


class BestAccuracy(NamedTuple):
    threshold: float
    accuracy: float
    """Share of pairs decided rightly at it, in [0, 1]."""


@dataclass(frozen=True)
class EqualErrorRate:
    rate: float
    """Mean of FAR and 1 - TAR where they come nearest to each other, in [0, 1]."""
    threshold: float


@dataclass(frozen=True)
class OperatingPoint:
    threshold: float
    """Accept from this score on."""
    far: float
    """False accept rate at it, in [0, 1]."""
    tar: float
    """True accept rate at it, in [0, 1]."""


@dataclass(frozen=True)
class VerificationMetrics:
    pairs: int
    same_pairs: int
    loss: float
    """Binary cross entropy (1 = same), mean over pairs, in nats."""
    accuracy: float
    """Share of pairs decided rightly at 0.5, the reference scripts' figure, in [0, 1]."""
    roc_auc: float | None
    """Area under the ROC curve in [0, 1]; None where one kind of pair is missing."""
    average_precision: float | None
    """Area under the curve of precision over recall, in steps, in [0, 1]; None where one kind of pair is missing."""
    equal_error_rate: EqualErrorRate | None
    """None where one kind of pair is missing."""
    tar_at_far: dict[float, OperatingPoint | None]
    """For each of FALSE_ACCEPT_RATES; None where the pairs cannot say (operating_point)."""
    best_accuracy: BestAccuracy
    """On these very pairs, so better than can be hoped for on others."""
    threshold: float
    """The operating one: a pair is accepted as "same" when score >= threshold."""
    at_threshold: Decisions
    calibration: Calibration
    bounds: dict[str, float]
    """How far a figure can be from the exact one, apart from rounding (1e-9). Empty where all are exact."""
    not_computed: dict[str, str]
    """Name of a figure that is None -> why, in one line."""


def verification_metrics(
    scores: Scores, is_same: npt.NDArray[np.bool_], *, threshold: float = REFERENCE_THRESHOLD
) -> VerificationMetrics:
    """Metrics of (P,) scores in [0, 1] against (P,) truth.

    Raises:
        InputDataError: no pairs.
        IntegrityError: a score is NaN or outside [0, 1].
    """
    return metrics_of_counts(ScoreCounts.of(scores, is_same), threshold=threshold)


def metrics_of_counts(counts: ScoreCounts, *, threshold: float = REFERENCE_THRESHOLD) -> VerificationMetrics:
    """Raises:
    InputDataError: no pairs.
    """
    pairs, same_pairs = counts.same_pairs + counts.different_pairs, counts.same_pairs
    if pairs == 0:
        raise InputDataError("there is no pair to measure; expected at least one", code="no-pairs")
    not_computed: dict[str, str] = {}
    if not _has_both(counts):
        reason = f"needs pairs of both kinds, got {same_pairs:,} same and {counts.different_pairs:,} different"
        not_computed = dict.fromkeys(("roc_auc", "average_precision", "eer"), reason)
    points: dict[float, OperatingPoint | None] = {}
    for far in FALSE_ACCEPT_RATES:
        try:
            points[far] = operating_point_of_counts(counts, far)
        except InputDataError as error:
            points[far] = None
            not_computed[f"tar_at_far/{far:g}"] = str(error)
    equal = _equal_error_point(counts)
    decisions = decisions_at(counts, threshold)
    for name in ("precision", "recall", "f1", "mcc", "far"):
        if getattr(decisions, name) is None:
            not_computed[f"at_threshold/{name}"] = "would divide by zero: no pair of a kind, or all decided alike"
    thresholds = {far: point.threshold for far, point in points.items() if point}
    return VerificationMetrics(
        pairs=pairs,
        same_pairs=same_pairs,
        loss=_loss(counts),
        accuracy=decisions_at(counts, REFERENCE_THRESHOLD).accuracy,
        roc_auc=_area_under_roc(counts),
        average_precision=_average_precision(counts),
        equal_error_rate=EqualErrorRate((equal.far + 1 - equal.tar) / 2, equal.threshold) if equal else None,
        tar_at_far=points,
        best_accuracy=_best_accuracy(counts),
        threshold=threshold,
        at_threshold=decisions,
        calibration=calibration(counts),
        bounds={} if counts.exact else bounds_of(counts, threshold=threshold, threshold_at_far=thresholds),
        not_computed=not_computed,
    )


def binary_cross_entropy(scores: Scores, is_same: npt.NDArray[np.bool_]) -> float:
    """Mean of -log(score) over same pairs and -log(1 - score) over different ones, in nats.

    Logarithms are cut at -100 as torch.nn.BCELoss does, so a confident mistake costs 100 and not infinity.
    """
    return _loss(ScoreCounts.of(scores, is_same))


def _loss(counts: ScoreCounts) -> float:
    with np.errstate(divide="ignore"):
        of_same = -np.maximum(np.log(counts.scores), -100.0)
        of_different = -np.maximum(np.log(1.0 - counts.scores), -100.0)
    total = float((counts.same * of_same + counts.different * of_different).sum())
    return total / (counts.same_pairs + counts.different_pairs)


def roc_auc(scores: Scores, is_same: npt.NDArray[np.bool_]) -> float | None:
    """Probability that a random same pair scores above a random different pair, ties counted half.

    This is the Mann-Whitney U statistic divided by the number of (same, different) combinations; see Fawcett,
    "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006). None where one kind of pair is missing.
    """
    return _area_under_roc(ScoreCounts.of(scores, is_same))


def _area_under_roc(counts: ScoreCounts) -> float | None:
    if not _has_both(counts):
        return None
    below_or_tied = counts.different_pairs - counts.different_accepted[1:]
    twice = counts.same * (2 * below_or_tied - counts.different)
    return int(twice.sum()) / (2 * counts.same_pairs * counts.different_pairs)


def _average_precision(counts: ScoreCounts) -> float | None:
    """Sum over the distinct scores, from the highest, of (R_n - R_{n-1}) P_n: recall gained there times precision from
    there on, without interpolation, as scikit-learn computes it; Manning, Raghavan and Schütze, "Introduction to
    Information Retrieval" (2008), 8.4.
    """
    if not _has_both(counts):
        return None
    accepted_same = counts.same_accepted[:-1]
    precision = accepted_same / (accepted_same + counts.different_accepted[:-1])
    return float((counts.same * precision).sum()) / counts.same_pairs


def equal_error_rate(scores: Scores, is_same: npt.NDArray[np.bool_]) -> OperatingPoint | None:
    """The point at which the share of same pairs rejected comes nearest to that of different pairs accepted.

    Thresholds are the scores that occur; of two equally near the lower one. The equal error rate is the mean of the two
    shares there: (point.far + 1 - point.tar) / 2. None where one kind of pair is missing.
    """
    return _equal_error_point(ScoreCounts.of(scores, is_same))


def _equal_error_point(counts: ScoreCounts) -> OperatingPoint | None:
    if not _has_both(counts):
        return None
    rejected_same = counts.same_pairs - counts.same_accepted[:-1]
    gap = counts.different_accepted[:-1] * counts.same_pairs - rejected_same * counts.different_pairs
    return _point(counts, int(np.argmin(np.abs(gap))))


def operating_point(scores: Scores, is_same: npt.NDArray[np.bool_], far: float) -> OperatingPoint:
    """The lowest threshold at which at most the share `far` of different pairs is accepted.

    The threshold lies half-way between the highest score that must be rejected and the next higher score of any pair
    (1 if there is none), so that rounding on another provider moves no pair across it.

    Raises:
        InputDataError: no same pair, fewer different pairs than MIN_FALSE_ACCEPTS / far, or a larger share of them than
            `far` with a score of 1.
    """
    return operating_point_of_counts(ScoreCounts.of(scores, is_same), far)


def operating_point_of_counts(counts: ScoreCounts, far: float) -> OperatingPoint:
    """`operating_point` of counted scores; `far` lies between 0 and 1."""
    needed = different_pairs_needed(far)
    if counts.different_pairs < needed or counts.same_pairs == 0:
        raise InputDataError(
            f"a false accept rate of {far:g} needs {needed:,} different pairs (so that {MIN_FALSE_ACCEPTS} may be "
            f"accepted) and a same pair, got {counts.different_pairs:,} and {counts.same_pairs:,}; add pictures or "
            "choose a higher rate",
            code="too-few-pairs",
        )
    allowed = int(far * counts.different_pairs + 1e-9)
    first = int(np.searchsorted(-counts.different_accepted, -allowed, side="left"))
    if first == len(counts.scores) and counts.scores[-1] == 1:
        raise InputDataError(
            f"more different pairs than a false accept rate of {far:g} allows have a score of 1; the network confuses "
            "them, and no threshold tells them apart"
        )
    return _point(counts, first, _threshold_below(counts, first))


def different_pairs_needed(far: float) -> int:
    return math.ceil(MIN_FALSE_ACCEPTS / far - 1e-9)


def _best_accuracy(counts: ScoreCounts) -> BestAccuracy:
    """The highest accuracy that a threshold in [0, 1] gives, and the lowest such threshold.

    It lies half-way between two neighbouring scores; 0 accepts all.
    """
    right = counts.same_accepted + counts.different_pairs - counts.different_accepted
    if counts.scores[-1] == 1:
        right = right[:-1]  # a score of 1 is accepted at any threshold
    best = int(np.argmax(right))
    return BestAccuracy(_threshold_below(counts, best), decisions_from(counts, best).accuracy)


@dataclass(frozen=True)
class FoldAccuracy:
    mean: float
    standard_error: float
    """Sample standard deviation over the folds, divided by the root of their number."""
    accuracies: tuple[float, ...]
    """Of each fold, at the threshold that is best on the others, in [0, 1]."""
    thresholds: tuple[float, ...]


def fold_accuracy(scores: Scores, is_same: npt.NDArray[np.bool_], fold: npt.NDArray[np.int64]) -> FoldAccuracy:
    """Accuracy of each fold at the threshold with the best accuracy on all others, as in LFW's "View 2".

    Huang, Ramesh, Berg and Learned-Miller, "Labeled Faces in the Wild", technical report 07-49, University of
    Massachusetts, Amherst (2007).

    Args:
        fold: (P,) the fold of each pair.

    Raises:
        InputDataError: fewer than two folds.
        IntegrityError: a score is NaN or outside [0, 1].
    """
    folds = np.unique(fold)
    if len(folds) < 2:
        raise InputDataError(f"accuracy by folds needs at least two folds of pairs, got {len(folds)}")
    accuracies, thresholds = [], []
    for k in folds.tolist():
        held_out = fold == k
        thresholds.append(_best_accuracy(ScoreCounts.of(scores[~held_out], is_same[~held_out])).threshold)
        accuracies.append(decisions_at(ScoreCounts.of(scores[held_out], is_same[held_out]), thresholds[-1]).accuracy)
    standard_error = float(np.std(accuracies, ddof=1)) / math.sqrt(len(folds))
    return FoldAccuracy(float(np.mean(accuracies)), standard_error, tuple(accuracies), tuple(thresholds))


def one_shot_accuracy(scores: Scores, is_same: npt.NDArray[np.bool_], ways: int) -> float:
    """Share of episodes in which the support of the query's class scores highest; of n that tie for it each gets 1 / n.

    Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction", Science
    350 (2015). Chance is 1 / ways. Pairs k * ways to (k + 1) * ways - 1 are episode k, one of them same.

    Raises:
        InputDataError: no episode, or not one same pair in each.
    """
    if len(scores) == 0 or len(scores) % ways or (is_same.reshape(-1, ways).sum(axis=1) != 1).any():
        raise InputDataError(f"one-shot accuracy needs episodes of {ways} pairs, exactly one of them same")
    by_episode, right = scores.reshape(-1, ways), is_same.reshape(-1, ways)
    highest = by_episode == by_episode.max(axis=1, keepdims=True)
    return float(np.mean((highest & right).sum(axis=1) / highest.sum(axis=1)))


def _has_both(counts: ScoreCounts) -> bool:
    return counts.same_pairs > 0 and counts.different_pairs > 0


def _threshold_below(counts: ScoreCounts, first: int) -> float:
    """Half-way between scores[first] and the next lower one, outside of both bins of a histogram; 0 and 1 are what lies
    beyond the scores.
    """
    if first == 0:
        return 0.0
    low, high = counts.ends
    above = float(low[first]) if first < len(low) else 1.0
    return (float(high[first - 1]) + above) / 2


def _point(counts: ScoreCounts, first: int, threshold: float | None = None) -> OperatingPoint:
    return OperatingPoint(
        float(counts.scores[first]) if threshold is None else threshold,
        int(counts.different_accepted[first]) / counts.different_pairs,
        int(counts.same_accepted[first]) / counts.same_pairs,
    )
