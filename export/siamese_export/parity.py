"""PyTorch against ONNX Runtime: both graphs, and end to end on pictures. No bundle appears that does not pass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from siamese_deploy.errors import ParityError
from siamese_deploy.verifier import Embeddings, Images, Verifier

BATCH_SIZES = (1, 2, 3, 17, 64)
_HEAD_LIMIT = {"head_score_difference": 1e-4}
LIMITS = {
    "fp32": {"relative_embedding_error": 1e-5, **_HEAD_LIMIT, "end_to_end_score_difference": 1e-4},
    "fp16": {"relative_embedding_error": 5e-2, **_HEAD_LIMIT},
    "int8-cpu": _HEAD_LIMIT,
    "int8-tensorrt": _HEAD_LIMIT,
}
"""By precision. What has no limit must be finite, and is judged by its accuracy instead (accuracy.Cost)."""


@dataclass(frozen=True)
class Parity:
    """Largest differences found over all batch sizes."""

    precision: str
    pictures: int
    source: str
    """Where the pictures came from."""
    relative_embedding_error: float
    """max over pictures of |torch - onnx| / |torch| (Euclidean norms)."""
    head_score_difference: float
    """max |difference| of scores that both heads give to PyTorch's embeddings."""
    end_to_end_score_difference: float
    """max |difference| of scores from picture to score."""

    @property
    def limits(self) -> dict[str, float]:
        return LIMITS[self.precision]

    def to_json(self) -> dict[str, Any]:
        figures = {name: value for name, value in asdict(self).items() if name != "precision"}
        return {**figures, "batch_sizes": list(BATCH_SIZES), "limits": self.limits}


def measure_parity(
    reference: Verifier, exported: Verifier, images: Images, *, source: str, precision: str = "fp32"
) -> Parity:
    """Compare the exported graphs with the network on (N, H, W, 3) uint8 pictures, N >= 2 * max(BATCH_SIZES).

    Of every batch size two batches are run.
    """
    embedding_error = head_difference = end_difference = 0.0
    for batch_size in BATCH_SIZES:
        some = images[: 2 * batch_size]
        expected, got = _embed(reference, some, batch_size), _embed(exported, some, batch_size)
        norms = np.maximum(np.linalg.norm(expected, axis=1), 1e-12)
        embedding_error = _worse(embedding_error, np.linalg.norm(got - expected, axis=1) / norms)
        for shift in (0, 1):  # each picture with itself, and with the next one
            left, right = expected[:batch_size], np.roll(expected, shift, axis=0)[:batch_size]
            scores = reference.score(left, right)
            head_difference = _worse(head_difference, exported.score(left, right) - scores)
            one_to_many = exported.score(left[:1], right) - reference.score(left[:1], right)
            head_difference = _worse(head_difference, one_to_many)
            all_scores = reference.score(expected, np.roll(expected, shift, axis=0))
            end_difference = _worse(end_difference, exported.score(got, np.roll(got, shift, axis=0)) - all_scores)
    return Parity(precision, len(images), source, embedding_error, head_difference, end_difference)


def require_parity(parity: Parity) -> None:
    """Raises:
    ParityError: a difference is above its limit, or NaN.
    """
    failed = []
    for name, what in (
        ("relative_embedding_error", "backbone: relative embedding error"),
        ("head_score_difference", "head: score difference"),
        ("end_to_end_score_difference", "end to end: score difference"),
    ):
        value, limit = getattr(parity, name), parity.limits.get(name, math.inf)
        if not (math.isfinite(value) and value <= limit):
            failed.append(f"{what} {value:.3g} (at most {limit:.0e})")
    if failed:
        raise ParityError(
            f"the exported {parity.precision} graphs do not answer like the network on {parity.pictures} pictures "
            f"({parity.source}): {'; '.join(failed)}; no bundle was written"
        )


def _embed(verifier: Verifier, images: Images, batch_size: int) -> Embeddings:
    return np.concatenate([verifier.embed(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def _worse(so_far: float, differences: np.ndarray) -> float:
    # np.maximum, unlike max, lets a NaN through, and a NaN is no parity.
    return float(np.maximum(so_far, np.abs(differences).max()))
