"""Run a Siamese verification bundle: folder -> pairs -> embeddings -> scores -> report. Never needs torch.

Reading order: image_folder, pairs, preprocess, verifier, bundle, providers, runtime, embedding, metrics,
evaluate, comparison, report.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from siamese_deploy.bundle import Bundle, read_bundle
    from siamese_deploy.embedding_cache import EmbeddingCache
    from siamese_deploy.errors import SiameseError
    from siamese_deploy.evaluate import Evaluation, evaluate_folder
    from siamese_deploy.gallery import Gallery
    from siamese_deploy.runtime import OnnxVerifier

__all__ = [
    "Bundle",
    "EmbeddingCache",
    "Evaluation",
    "Gallery",
    "OnnxVerifier",
    "SiameseError",
    "evaluate_folder",
    "read_bundle",
]

_HOME = {
    "Bundle": "bundle",
    "EmbeddingCache": "embedding_cache",
    "Evaluation": "evaluate",
    "Gallery": "gallery",
    "OnnxVerifier": "runtime",
    "SiameseError": "errors",
    "evaluate_folder": "evaluate",
    "read_bundle": "bundle",
}


def __getattr__(name: str) -> object:
    # On first use, so that `siamese --help` does not wait for NumPy and Pillow.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
