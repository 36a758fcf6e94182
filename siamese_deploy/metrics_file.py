"""metrics.json: what an evaluation found, in one flat file; docs/metrics.schema.json is its schema."""

from __future__ import annotations

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from siamese_deploy.errors import IntegrityError
from siamese_deploy.evaluate import Evaluation
from siamese_deploy.metrics import FALSE_ACCEPT_RATES, fold_accuracy, one_shot_accuracy
from siamese_deploy.metrics.bootstrap import LEVEL, METHOD, Replicates
from siamese_deploy.pairs import Pairs
from siamese_deploy.table_files import open_text
from siamese_deploy.verifier import Verifier

FORMAT = "siamese-evaluation/1"


def metrics_content(
    evaluation: Evaluation, spread: Replicates, verifier: Verifier, *, pair_scheme: str, seed: int | None
) -> dict[str, Any]:
    """The content of metrics.json. All but `run` is the same whenever and wherever the evaluation is repeated."""
    metrics, decisions = evaluation.metrics, evaluation.metrics.at_threshold
    points = metrics.tar_at_far
    equal = metrics.equal_error_rate
    return {
        "format": FORMAT,
        "pairs": metrics.pairs,
        "same_pairs": metrics.same_pairs,
        "pair_digest": evaluation.pair_digest,
        "pair_scheme": pair_scheme,
        "seed": seed,
        "loss": metrics.loss,
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": equal and equal.rate,
        "eer_threshold": equal and equal.threshold,
        "tar_at_far": {f"{far:g}": point and point.tar for far, point in points.items()},
        "threshold_at_far": {f"{far:g}": point and point.threshold for far, point in points.items()},
        "best_accuracy": metrics.best_accuracy.accuracy,
        "best_accuracy_threshold": metrics.best_accuracy.threshold,
        "threshold": metrics.threshold,
        "threshold_origin": verifier.threshold_origin,
        "at_threshold": {
            "accuracy": decisions.accuracy,
            "precision": decisions.precision,
            "recall": decisions.recall,
            "f1": decisions.f1,
            "mcc": decisions.mcc,
            "far": decisions.far,
            "true_accepts": decisions.true_accepts,
            "false_accepts": decisions.false_accepts,
            "true_rejects": decisions.true_rejects,
            "false_rejects": decisions.false_rejects,
        },
        "calibration": _calibration(evaluation),
        "folds": _folds(evaluation),
        "one_shot": _one_shot(evaluation),
        "intervals": _intervals(spread),
        "exact": evaluation.counts.exact,
        "bounds": dict(metrics.bounds),
        "not_computed": metrics.not_computed | _not_computed(evaluation, spread),
        "classes": len(np.unique(evaluation.folder.labels[evaluation.images])),
        "images": len(evaluation.images),
        "files_skipped": len(evaluation.skipped),
        "pairs_skipped": evaluation.pairs_skipped,
        "backend": verifier.backend,
        "provider": verifier.provider,
        "model_digest": verifier.model_digest,
        "run": _run(evaluation, verifier),
    }


def metrics_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_metrics(file: Path) -> dict[str, Any]:
    """The content of a metrics.json of ours.

    Raises:
        InputDataError: there is none.
        EnvironmentFault: it may not be read.
        IntegrityError: it is something else, or damaged.
    """
    try:
        with open_text(file, "the metrics.json of an earlier evaluation") as text:
            content = json.load(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{file}: is no metrics.json (not JSON)") from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("pair_digest"), str)
    ):
        raise IntegrityError(
            f"{file}: is no metrics.json of format {FORMAT}; evaluate again with this version", code="other-version"
        )
    return content


def _calibration(evaluation: Evaluation) -> dict[str, Any]:
    calibration = evaluation.metrics.calibration
    return {
        "brier": calibration.brier,
        "ece": calibration.expected_calibration_error,
        "bins": [
            {"low": b.low, "high": b.high, "pairs": b.pairs, "mean_score": b.mean_score, "same_share": b.same_share}
            for b in calibration.bins
            if b.pairs
        ],
    }


def _not_computed(evaluation: Evaluation, spread: Replicates) -> dict[str, str]:
    reasons = {"intervals": spread.reason} if spread.reason else {}
    if isinstance(evaluation.pairs, Pairs) and evaluation.pairs.fold is not None and _n_folds(evaluation.pairs) < 2:
        reasons["folds"] = "accuracy over folds needs at least two folds with pairs, got one"
    return reasons


def _n_folds(pairs: Pairs) -> int:
    return 0 if pairs.fold is None else len(np.unique(pairs.fold))


def _folds(evaluation: Evaluation) -> dict[str, Any] | None:
    pairs = evaluation.pairs
    if not isinstance(pairs, Pairs) or pairs.fold is None or _n_folds(pairs) < 2:
        return None
    found = fold_accuracy(evaluation.scores, pairs.is_same, pairs.fold)
    return {"accuracy": found.mean, "standard_error": found.standard_error, "accuracies": list(found.accuracies)}


def _one_shot(evaluation: Evaluation) -> dict[str, Any] | None:
    pairs = evaluation.pairs
    if not isinstance(pairs, Pairs) or not pairs.ways:
        return None
    accuracy = one_shot_accuracy(evaluation.scores, pairs.is_same, pairs.ways)
    return {"ways": pairs.ways, "episodes": len(pairs) // pairs.ways, "accuracy": accuracy}


def _intervals(spread: Replicates) -> dict[str, Any] | None:
    if spread.reason:
        return None

    def of(name: str) -> list[float] | None:
        interval = spread.interval(name)
        return interval and list(interval)

    return {
        "method": METHOD,
        "level": LEVEL,
        "replicates": spread.replicates,
        "classes": spread.classes,
        **{name: of(name) for name in ("accuracy", "roc_auc", "average_precision", "eer")},
        "tar_at_far": {f"{far:g}": of(f"tar_at_far/{far:g}") for far in FALSE_ACCEPT_RATES},
        "at_threshold": {name: of(f"at_threshold/{name}") for name in ("accuracy", "recall", "far")},
    }


def _run(evaluation: Evaluation, verifier: Verifier) -> dict[str, Any]:
    embedded, pairs = evaluation.images_embedded, len(evaluation.pairs)
    return {
        "python": platform.python_version(),
        "siamese-toolkit": metadata.version("siamese-toolkit"),
        "numpy": np.__version__,
        "pillow": metadata.version("pillow"),
        "runtime": f"{verifier.backend} {verifier.runtime_version}",
        "seconds": {"embed": _digits(evaluation.embed_s), "score": _digits(evaluation.score_s)},
        "images_embedded": embedded,
        "images_from_cache": evaluation.images_from_cache,
        # Of a partly warm cache the time says nothing of either kind.
        "embed_ms_per_image": None if evaluation.images_from_cache else _digits(1e3 * evaluation.embed_s / embedded),
        "score_us_per_pair": _digits(1e6 * evaluation.score_s / pairs),
    }


def _digits(value: float, digits: int = 4) -> float:
    return round(value, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0.0
