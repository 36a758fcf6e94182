"""Scores + is_same -> numbers; docs/metrics.md explains each to its reader.

score_counts   how many pairs of each kind have which score: exact, or from a histogram
figures        the figures, from counts    decisions    calibration    bounds of the histogram's
bootstrap      intervals, and whether a difference can be chance
"""

from siamese_deploy.metrics.decisions import Decisions, accepted
from siamese_deploy.metrics.figures import (
    FALSE_ACCEPT_RATES,
    MIN_FALSE_ACCEPTS,
    REFERENCE_THRESHOLD,
    EqualErrorRate,
    OperatingPoint,
    VerificationMetrics,
    binary_cross_entropy,
    different_pairs_needed,
    equal_error_rate,
    fold_accuracy,
    metrics_of_counts,
    one_shot_accuracy,
    operating_point,
    roc_auc,
    verification_metrics,
)
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram

__all__ = [
    "FALSE_ACCEPT_RATES",
    "MIN_FALSE_ACCEPTS",
    "REFERENCE_THRESHOLD",
    "Decisions",
    "EqualErrorRate",
    "OperatingPoint",
    "ScoreCounts",
    "ScoreHistogram",
    "VerificationMetrics",
    "accepted",
    "binary_cross_entropy",
    "different_pairs_needed",
    "equal_error_rate",
    "fold_accuracy",
    "metrics_of_counts",
    "one_shot_accuracy",
    "operating_point",
    "roc_auc",
    "verification_metrics",
]
