"""What a bundle is worth on the user's validation pictures: its threshold, and what a lower precision costs."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siamese_deploy.errors import AccuracyError, InputDataError
from siamese_deploy.evaluate import Evaluation, evaluate_pairs
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.metrics import OperatingPoint, accepted, different_pairs_needed, equal_error_rate, operating_point
from siamese_deploy.pairs import every_pair, sample_pairs
from siamese_deploy.verifier import Verifier

FALSE_ACCEPT_RATES = (0.1, 0.01, 0.001, 0.0001)
DEFAULT_TARGET_FAR = 0.001


@dataclass(frozen=True)
class Accuracy:
    """Over every pair of the validation folder."""

    source: str
    data_digest: str
    """ImageFolder.digest of the validation folder."""
    pairs: int
    same_pairs: int
    roc_auc: float
    equal_error_rate: float
    tar_at_far: dict[str, float | None]
    """True accept rate at each of FALSE_ACCEPT_RATES; None where the pairs cannot say (metrics.operating_point)."""
    operating_point: OperatingPoint | None
    """At the target false accept rate; None where it was not asked for and the pairs cannot say."""
    target_far: float
    evaluation: Evaluation = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Without the operating point, which is the manifest's threshold."""
        names = ("source", "data_digest", "pairs", "same_pairs", "roc_auc", "equal_error_rate", "tar_at_far")
        return {name: getattr(self, name) for name in names}

    def origin_of(self, point: OperatingPoint) -> str:
        """Where the threshold comes from, in a sentence for the manifest."""
        return (
            f"false accept rate at most {self.target_far:g} on {self.pairs:,} pairs of {self.source}: there "
            f"{point.far:.3g}, true accept rate {point.tar:.4f}"
        )


def validation_folder(val_path: Path, target_far: float | None) -> ImageFolder:
    """The folder to measure on, refused here if its names alone show that it cannot serve.

    Raises:
        InputDataError: no such folder, no pairs, or too few different ones for a `target_far` that was asked for.
    """
    folder = scan_image_folder(val_path)
    sample_pairs(folder)  # raises where no pair of either kind can be formed
    sizes = np.bincount(folder.labels)
    different = (len(folder) ** 2 - int((sizes**2).sum())) // 2
    if target_far is not None and different < different_pairs_needed(target_far):
        raise InputDataError(
            f"{val_path}: a false accept rate of {target_far:g} needs {different_pairs_needed(target_far):,} pairs of "
            f"different classes, got {different:,}; add pictures or choose a higher --target_far",
            code="too-few-pairs",
        )
    return folder


def measure_accuracy(verifier: Verifier, folder: ImageFolder, target_far: float | None) -> Accuracy:
    """Score every pair of the folder.

    Args:
        target_far: the false accept rate that the threshold is for; None: DEFAULT_TARGET_FAR, if it can be resolved.

    Raises:
        InputDataError: no pairs are left, or too few different ones for a `target_far` that was asked for.
    """
    evaluation = evaluate_pairs(verifier, folder, every_pair(folder), show_progress=sys.stderr.isatty())
    scores, is_same = evaluation.scores, evaluation.pairs.is_same
    roc_auc, equal = evaluation.metrics.roc_auc, equal_error_rate(scores, is_same)
    if roc_auc is None or equal is None:
        raise InputDataError(
            f"{folder.root}: the readable pictures give pairs of one kind only; add pictures", code="too-few-pairs"
        )

    def at(far: float) -> OperatingPoint | None:
        try:
            return operating_point(scores, is_same, far)
        except InputDataError:  # too few pairs, or too many scores of 1
            return None

    points = {far: at(far) for far in FALSE_ACCEPT_RATES}
    chosen = at(DEFAULT_TARGET_FAR) if target_far is None else operating_point(scores, is_same, target_far)
    return Accuracy(
        source=folder.root.name,
        data_digest=folder.digest(),
        pairs=len(is_same),
        same_pairs=int(is_same.sum()),
        roc_auc=roc_auc,
        equal_error_rate=(equal.far + 1 - equal.tar) / 2,
        tar_at_far={f"{far:g}": point.tar if point else None for far, point in points.items()},
        operating_point=chosen,
        target_far=DEFAULT_TARGET_FAR if target_far is None else target_far,
        evaluation=evaluation,
    )


@dataclass(frozen=True)
class Limits:
    """What a lower precision may cost at most."""

    auc_drop: float = 0.002
    """Fall of ROC AUC."""
    tar_drop: float = 0.01
    """Fall of the true accept rate at the target false accept rate, each precision at its own threshold."""
    far_growth: float = 1.25
    """False accept rate at the float32 threshold, in multiples of float32's there."""


@dataclass(frozen=True)
class Cost:
    """A lower precision against float32 in PyTorch, on the same pairs."""

    precision: str
    float32: Accuracy
    lowered: Accuracy
    auc_drop: float
    tar_drop: float
    far_growth: float
    """Counted from one false accept where float32 has none."""
    limits: Limits

    def to_json(self) -> dict[str, Any]:
        return {
            "float32": self.float32.to_json(),
            "target_far": self.float32.target_far,
            "measured": {"auc_drop": self.auc_drop, "tar_drop": self.tar_drop, "far_growth": self.far_growth},
            "limits": asdict(self.limits),
        }

    def table(self) -> list[str]:
        """Lines of equal columns."""
        before, after = (a.operating_point.tar if a.operating_point else np.nan for a in (self.float32, self.lowered))
        far = f"{self.float32.target_far:g}"
        rows = [
            ("", "fp32", self.precision, "change", "limit"),
            _row("ROC AUC", self.float32.roc_auc, self.lowered.roc_auc, f"-{self.limits.auc_drop:g}"),
            _row(f"true accept rate at {far}", before, after, f"-{self.limits.tar_drop:g}"),
            (f"false accepts at fp32's {far}", "", "", f"x {self.far_growth:.3f}", f"x {self.limits.far_growth:g}"),
        ]
        return [f"  {a:32}{b:>10}{c:>15}{d:>10}{e:>9}" for a, b, c, d, e in rows]

    def require(self) -> None:
        """Raises:
        AccuracyError: a limit is not met.
        """
        checks = (
            ("ROC AUC falls by", self.auc_drop, self.limits.auc_drop),
            (f"true accept rate at {self.float32.target_far:g} falls by", self.tar_drop, self.limits.tar_drop),
            ("false accepts at the fp32 threshold grow by a factor of", self.far_growth, self.limits.far_growth),
        )
        failed = [f"{what} {value:.4g} (at most {limit:g})" for what, value, limit in checks if not value <= limit]
        if failed:
            raise AccuracyError(
                f"{self.precision} costs too much on {self.float32.pairs:,} pairs of {self.float32.source}: "
                f"{'; '.join(failed)}; no bundle was written; choose a higher precision, or raise the limit"
            )


def cost_of_precision(precision: str, float32: Accuracy, lowered: Accuracy, limits: Limits) -> Cost:
    """Raises:
    InputDataError: one of them was measured without a false accept rate that its pairs resolve.
    """
    if float32.operating_point is None or lowered.operating_point is None:
        raise InputDataError(
            f"{float32.source}: too few pairs for a false accept rate of {float32.target_far:g}", code="too-few-pairs"
        )
    is_different = ~lowered.evaluation.pairs.is_same
    n_accepted = int(accepted(lowered.evaluation.scores[is_different], float32.operating_point.threshold).sum())
    before = round(float32.operating_point.far * int(is_different.sum()))
    return Cost(
        precision=precision,
        float32=float32,
        lowered=lowered,
        auc_drop=float32.roc_auc - lowered.roc_auc,
        tar_drop=float32.operating_point.tar - lowered.operating_point.tar,
        far_growth=n_accepted / max(before, 1),
        limits=limits,
    )


def _row(name: str, before: float, after: float, limit: str) -> tuple[str, ...]:
    return name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}", limit
