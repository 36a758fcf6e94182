"""The two verbs every backend offers, and the legend of shapes.

    images      uint8    (N, H, W, 3)  RGB, (H, W) = verifier.preprocess.size_hw
    embeddings  float32  (N, dim)      any scale, any sign
    scores      float32  (P,)          in [0, 1], higher = more alike; accept when score >= threshold

`embed` is the expensive half and runs once a picture; `score` is the cheap half and runs once a pair.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from siamese_deploy.preprocess import Preprocess

Images: TypeAlias = npt.NDArray[np.uint8]
Embeddings: TypeAlias = npt.NDArray[np.float32]
Scores: TypeAlias = npt.NDArray[np.float32]


class Verifier(Protocol):
    """Implemented by `OnnxVerifier` (a bundle) and `TorchVerifier` (a checkpoint)."""

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def backend(self) -> str:
        """ "onnxruntime" or "pytorch"."""
        ...

    @property
    def provider(self) -> str:
        """Where it really runs: "cpu", "cuda" or "tensorrt"."""
        ...

    @property
    def model_digest(self) -> str:
        """SHA-256 (hex) that names the model: a bundle's digest, or that of the checkpoint file."""
        ...

    @property
    def runtime_version(self) -> str:
        """Of the backend's library."""
        ...

    @property
    def embedding_dim(self) -> int: ...

    @property
    def threshold(self) -> float:
        """Operating threshold in [0, 1]: accept when score >= threshold."""
        ...

    @property
    def threshold_origin(self) -> str:
        """Where it came from, in words."""
        ...

    @property
    def batch_size(self) -> int:
        """Pictures in a call of `embed` that costs the least time a picture, and no more memory than that takes."""
        ...

    @property
    def calls_at_once(self) -> int:
        """Threads that should call `embed` side by side to keep the device busy."""
        ...

    def embed(self, images: Images) -> Embeddings:
        """(N, H, W, 3) uint8 -> (N, dim) float32. N may be 0."""
        ...

    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        """(P, dim), (P, dim) -> (P,) float32 in [0, 1]; either side may be (1, dim) and is broadcast."""
        ...
