"""What a bundle is worth on the user's validation pictures, and the threshold that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siamese_deploy.errors import InputDataError
from siamese_deploy.evaluate import evaluate_pairs
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.metrics import OperatingPoint, different_pairs_needed, equal_error_rate, operating_point
from siamese_deploy.pairs import every_pair, sample_pairs
from siamese_deploy.verifier import Verifier

FALSE_ACCEPT_RATES = (0.1, 0.01, 0.001, 0.0001)
DEFAULT_TARGET_FAR = 0.001


@dataclass(frozen=True)
class Accuracy:
    """Over every pair of the validation folder, with the scores of the bundle itself."""

    source: str
    pairs: int
    same_pairs: int
    roc_auc: float
    equal_error_rate: float
    tar_at_far: dict[str, float | None]
    """True accept rate at each of FALSE_ACCEPT_RATES; None where there are too few different pairs to say."""
    operating_point: OperatingPoint | None
    """At the target false accept rate; None where it was not asked for and there are too few different pairs."""
    target_far: float

    def to_json(self) -> dict[str, Any]:
        """Without the operating point, which is the manifest's threshold."""
        return {
            "source": self.source,
            "pairs": self.pairs,
            "same_pairs": self.same_pairs,
            "roc_auc": self.roc_auc,
            "equal_error_rate": self.equal_error_rate,
            "tar_at_far": self.tar_at_far,
        }

    def origin_of(self, point: OperatingPoint) -> str:
        """Where the threshold comes from, in a sentence for the manifest."""
        return (
            f"false accept rate at most {self.target_far:g} on {self.pairs:,} pairs of {self.source}: there "
            f"{point.far:.3g}, true accept rate {point.tar:.4f}"
        )


def measure_accuracy(verifier: Verifier, val_path: Path, target_far: float | None) -> Accuracy:
    """Score every pair of the pictures below `val_path`.

    Args:
        target_far: the false accept rate that the threshold is for; None: DEFAULT_TARGET_FAR, if it can be resolved.

    Raises:
        InputDataError: the folder gives no pairs, or too few different ones for a `target_far` that was asked for.
    """
    folder = scan_image_folder(val_path)
    sample_pairs(folder)  # raises where no pair of either kind can be formed
    evaluation = evaluate_pairs(verifier, folder, every_pair(folder), show_progress=True)
    scores, is_same = evaluation.scores, evaluation.pairs.is_same
    n_different = len(is_same) - int(is_same.sum())
    roc_auc, equal = evaluation.metrics.roc_auc, equal_error_rate(scores, is_same)
    if roc_auc is None or equal is None:
        raise InputDataError(f"{val_path}: the readable pictures give pairs of one kind only; add pictures")

    def at(far: float) -> OperatingPoint | None:
        enough = n_different >= different_pairs_needed(far)
        return operating_point(scores, is_same, far) if enough else None

    points = {far: at(far) for far in FALSE_ACCEPT_RATES}
    chosen = at(DEFAULT_TARGET_FAR) if target_far is None else operating_point(scores, is_same, target_far)
    return Accuracy(
        source=val_path.name,
        pairs=len(is_same),
        same_pairs=int(is_same.sum()),
        roc_auc=roc_auc,
        equal_error_rate=(equal.far + 1 - equal.tar) / 2,
        tar_at_far={f"{far:g}": point.tar if point else None for far, point in points.items()},
        operating_point=chosen,
        target_far=DEFAULT_TARGET_FAR if target_far is None else target_far,
    )
