"""OnnxVerifier: a bundle on ONNX Runtime."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from siamese_deploy.bundle import (
    BACKBONE,
    EMBEDDINGS,
    HEAD,
    IMAGES,
    LEFT,
    RIGHT,
    SCORES,
    Bundle,
    golden_image,
    read_bundle,
)
from siamese_deploy.errors import BundleError, IntegrityError, ProviderError, UsageError
from siamese_deploy.preprocess import Preprocess, load_image
from siamese_deploy.providers import open_session, providers_to_try, run_session
from siamese_deploy.verifier import Embeddings, Images, Scores

# The golden check tells a wrong, damaged or overflowing network from rounding; export measures rounding itself. In 8
# bits a value next to the border of two steps may fall to either side on another provider.
GOLDEN_LIMIT = {"fp32": 1e-2, "fp16": 1e-2, "int8-cpu": 5e-2, "int8-tensorrt": 5e-2}
"""Largest relative error of the embedding and largest difference of the score, by precision."""


class OnnxVerifier:
    """Embeds pictures and scores pairs with the two graphs of a bundle.

    The provider is the one asked for or an error, and the bundle's golden check has passed on it before the
    constructor returns.

    Args:
        bundle: folder, or a `Bundle` already read.
        provider: "auto" (CUDA where it truly starts, else CPU), "cpu", "cuda" or "tensorrt".
        threads: CPU threads within one operator; default: the cores this process may use.

    Raises:
        InputDataError: no such bundle.
        BundleError: not a bundle, damaged, or refused by ONNX Runtime.
        IntegrityError: the golden check fails.
        ProviderError: the provider cannot start here.
        MissingExtraError: onnxruntime is not installed.
    """

    backend = "onnxruntime"

    def __init__(
        self, bundle: Bundle | str | os.PathLike[str], *, provider: str = "auto", threads: int | None = None
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        self.provider_note = ""
        """What "auto" passed over and why, or what makes this provider a poor choice for the bundle; "" if nothing."""
        candidates = providers_to_try(provider)
        for self.provider in candidates:
            try:
                self._open(threads)
                break
            except (ProviderError, IntegrityError) as error:
                if self.provider == candidates[-1]:
                    raise
                reason = str(error).removeprefix(f"provider {self.provider}: ").partition("; ")[0]
                self.provider_note = f"{self.provider} passed over: {reason}"
        if (self.bundle.manifest.precision, self.provider) == ("int8-tensorrt", "cpu"):
            self.provider_note = "this bundle's 8 bits are for TensorRT; here fp32 is faster"

    def _open(self, threads: int | None) -> None:
        self._backbone = open_session(self.bundle.backbone, BACKBONE, self.provider, threads)
        self._head = open_session(self.bundle.head, HEAD, self.provider, threads)
        self._check_signatures()
        self._check_golden()

    @property
    def preprocess(self) -> Preprocess:
        return self.bundle.manifest.preprocess

    @property
    def threshold(self) -> float:
        """Operating threshold in [0, 1]: accept when score >= threshold."""
        return self.bundle.manifest.threshold

    @property
    def model_digest(self) -> str:
        return self.bundle.digest

    def embed(self, images: Images) -> Embeddings:
        """(N, H, W, 3) uint8 RGB -> (N, dim) float32; more than the bundle's largest batch is split.

        Raises:
            UsageError: wrong shape or dtype.
        """
        height, width = self.preprocess.size_hw
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
            raise UsageError(f"images: expected uint8 (N, {height}, {width}, 3), got {images.dtype} {images.shape}")
        largest = self.bundle.manifest.batch[2]
        parts = [
            run_session(
                self._backbone, EMBEDDINGS, {IMAGES: np.ascontiguousarray(images[i : i + largest])}, self.provider
            )
            for i in range(0, len(images), largest)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.bundle.manifest.embedding_dim), np.float32)

    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        """(P, dim), (P, dim) float32 -> (P,) float32 in [0, 1]; either side may be (1, dim) and is broadcast.

        Raises:
            UsageError: wrong shape or dtype.
        """
        dim = self.bundle.manifest.embedding_dim
        rows = {len(left), len(right)} - {1}
        for side in (left, right):
            if side.dtype != np.float32 or side.ndim != 2 or side.shape[1] != dim or len(rows) > 1:
                raise UsageError(
                    f"embeddings: expected two float32 (P, {dim}) or (1, {dim}), got {left.dtype} {left.shape} and "
                    f"{right.dtype} {right.shape}"
                )
        scores: Scores = run_session(self._head, SCORES, {LEFT: left, RIGHT: right}, self.provider)
        return scores[:, 0]

    def compare(self, left: str | os.PathLike[str], right: str | os.PathLike[str]) -> float:
        """Score of two picture files, in [0, 1].

        Raises:
            ImageError: one of them cannot be used.
            IntegrityError: the network gives no finite score.
        """
        images = np.stack([load_image(path, self.preprocess) for path in (left, right)])
        embeddings = self.embed(images)
        score = float(self.score(embeddings[:1], embeddings[1:])[0])
        if not 0 <= score <= 1:
            raise IntegrityError(f"{left}, {right}: the network gives the score {score}; the model is damaged")
        return score

    def _check_signatures(self) -> None:
        manifest = self.bundle.manifest
        height, width = self.preprocess.size_hw
        dim = manifest.embedding_dim
        images = ("tensor(uint8)", [height, width, 3])
        self._check(self._backbone, BACKBONE, {IMAGES: images}, EMBEDDINGS, dim)
        side = ("tensor(float)", [dim])
        self._check(self._head, HEAD, {LEFT: side, RIGHT: side}, SCORES, 1)

    @staticmethod
    def _check(session: Any, name: str, inputs: dict[str, tuple[str, list[int]]], output: str, width: int) -> None:
        found_in = {node.name: (node.type, node.shape[1:]) for node in session.get_inputs()}
        found_out = {node.name: (node.type, node.shape[1:]) for node in session.get_outputs()}
        expected_out = {output: ("tensor(float)", [width])}
        if (found_in, found_out) != (inputs, expected_out):
            raise BundleError(f"{name}: expected {inputs} -> {expected_out}, got {found_in} -> {found_out}")

    def _check_golden(self) -> None:
        golden = self.bundle.manifest.golden
        embedding = self.embed(golden_image(self.preprocess.size_hw)[None])
        score = float(self.score(embedding, embedding)[0])
        error = float(np.linalg.norm(embedding[0] - golden.embedding) / (np.linalg.norm(golden.embedding) + 1e-12))
        limit = GOLDEN_LIMIT[self.bundle.manifest.precision]
        # Written so that NaN fails.
        if not (error <= limit and abs(score - golden.score) <= limit):
            raise IntegrityError(
                f"golden check failed on {self.provider}: relative embedding error {error:.2g} (at most "
                f"{limit}), score {score:.6f} (expected {golden.score:.6f}); the bundle does not "
                "answer here as it did at export"
            )
