"""Report pages of made-up scores, for the tests of the page as text and in a browser."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.metrics import metrics_of_counts
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram
from siamese_deploy.pairs import Pairs
from siamese_deploy.report_page import Example, report_page
from siamese_deploy.report_page.confusions import Confusions, WorstPair

HOSTILE = (
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=document.title='hacked'>",
    "\"'><svg onload=document.title='hacked'>",
    "--><b>${title} $style {{x}} &lt;",
    "\u202egnp.exe",
    "line\nbreak\ttab\x00zero\x1besc",
    "not utf-8 \udcff\udc80",
    "שלום",
    "x" * 200,
)


@dataclass(frozen=True)
class Page:
    text: str
    metrics: dict[str, Any]
    scores: np.ndarray
    """(P,) float32."""
    is_same: np.ndarray

    def decisions(self, threshold: float) -> dict[str, int]:
        """Counted one way only: score >= threshold as float64."""
        accepted = self.scores.astype(np.float64) >= threshold
        return {
            "true_accepts": int((accepted & self.is_same).sum()),
            "false_accepts": int((accepted & ~self.is_same).sum()),
            "true_rejects": int((~accepted & ~self.is_same).sum()),
            "false_rejects": int((~accepted & self.is_same).sum()),
        }


def make_page(
    classes: int = 39,
    images: int = 20,
    *,
    threshold: float = 0.83,
    names: Sequence[str] = (),
    only: bool | None = None,
    histogram: bool = False,
    **changes: object,
) -> Page:
    """Every pair of made-up pictures; `only` keeps one kind of pair; `changes` are put into the metrics."""
    class_names = [*names, *(f"class{c:04d}" for c in range(classes - len(names)))]
    paths = tuple(f"{name}/{k:02d}.png" for name in class_names for k in range(images))
    folder = ImageFolder(Path("p"), paths, np.repeat(np.arange(classes), images), tuple(class_names))
    left, right = np.triu_indices(len(folder), 1)
    is_same = folder.labels[left] == folder.labels[right]
    kept = np.ones(len(left), bool) if only is None else is_same == only
    pairs = Pairs(left[kept], right[kept], is_same[kept])
    random = np.random.RandomState(5)
    hard = random.random_sample(classes)[folder.labels[pairs.left]]
    logit = random.normal(np.where(pairs.is_same, 2.6 - hard, -4.2 + 2 * hard**3), 1.6)
    scores = (1 / (1 + np.exp(-logit))).astype(np.float32)
    counts = _histogram(scores, pairs.is_same) if histogram else ScoreCounts.of(scores, pairs.is_same)
    metrics = {**_metrics(counts, threshold, len(folder), classes), **changes}
    confusions = Confusions(folder, threshold)
    confusions.add(pairs, scores)
    accepts, rejects = (
        [_example(folder, pair) for pair in worst] for worst in (confusions.worst_accepts, confusions.worst_rejects)
    )
    text = report_page(metrics, counts, confusions.rows(), accepts, rejects)
    return Page(text, metrics, scores, pairs.is_same)


def _histogram(scores: np.ndarray, is_same: np.ndarray) -> ScoreCounts:
    histogram = ScoreHistogram()
    histogram.add(scores, is_same)
    return histogram.counts()


def _example(folder: ImageFolder, pair: WorstPair) -> Example:
    picture = io.BytesIO()
    Image.new("RGB", (392, 192), (200, 200, 200)).save(picture, "JPEG")
    return Example(
        left=folder.paths[pair.left],
        right=folder.paths[pair.right],
        left_class=folder.class_name(pair.left),
        right_class=folder.class_name(pair.right),
        score=pair.score,
        picture=picture.getvalue(),
    )


def _metrics(counts: ScoreCounts, threshold: float, images: int, classes: int) -> dict[str, Any]:
    metrics = metrics_of_counts(counts, threshold=threshold)
    points = {f"{far:g}": point for far, point in metrics.tar_at_far.items()}
    equal = metrics.equal_error_rate

    def near(value: float | None) -> list[float] | None:
        return None if value is None else [max(0.0, value - 0.031), min(1.0, value + 0.029)]

    return {
        "format": "siamese-evaluation/1",
        "pairs": metrics.pairs,
        "same_pairs": metrics.same_pairs,
        "pair_digest": "3f9a" * 16,
        "pair_scheme": "all",
        "seed": None,
        "loss": metrics.loss,
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": equal and equal.rate,
        "eer_threshold": equal and equal.threshold,
        "tar_at_far": {far: point and point.tar for far, point in points.items()},
        "threshold_at_far": {far: point and point.threshold for far, point in points.items()},
        "best_accuracy": metrics.best_accuracy.accuracy,
        "best_accuracy_threshold": metrics.best_accuracy.threshold,
        "threshold": threshold,
        "threshold_origin": "FAR 0.001 on the validation pairs",
        "at_threshold": {
            key: getattr(metrics.at_threshold, key)
            for key in (
                *("accuracy", "precision", "recall", "f1", "mcc", "far"),
                *("true_accepts", "false_accepts", "true_rejects", "false_rejects"),
            )
        },
        "calibration": {
            "brier": metrics.calibration.brier,
            "ece": metrics.calibration.expected_calibration_error,
            "bins": [vars(each) for each in metrics.calibration.bins],
        },
        "folds": None,
        "one_shot": None,
        "intervals": {
            "method": "bootstrap over classes",
            "level": 0.95,
            "replicates": 1000,
            "classes": classes,
            "accuracy": near(metrics.accuracy),
            "roc_auc": near(metrics.roc_auc),
            "average_precision": near(metrics.average_precision),
            "eer": near(equal and equal.rate),
            "tar_at_far": {far: near(point and point.tar) for far, point in points.items()},
            "at_threshold": {key: near(getattr(metrics.at_threshold, key)) for key in ("accuracy", "recall", "far")},
        },
        "exact": counts.exact,
        "bounds": dict(metrics.bounds),
        "not_computed": metrics.not_computed,
        "classes": classes,
        "images": images,
        "files_skipped": 2,
        "pairs_skipped": 17,
        "backend": "onnxruntime",
        "provider": "cpu",
        "model_digest": "b07c" * 16,
        "run": {
            "python": "3.11.7",
            "siamese-toolkit": "0.1.0",
            "numpy": "2.4.6",
            "pillow": "12.3.0",
            "runtime": "onnxruntime 1.32.0",
            "seconds": {"embed": 3.517, "score": 4.865},
            "images_embedded": images,
            "images_from_cache": 0,
            "embed_ms_per_image": 4.509,
            "score_us_per_pair": 16.01,
        },
    }
