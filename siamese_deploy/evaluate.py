"""The flow: folder -> pairs -> embeddings -> scores -> metrics; for both backends and for training's validation."""

from __future__ import annotations

import os
from dataclasses import dataclass

from siamese_deploy.embedding import ImageEmbeddings, embed_images, score_pairs
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder, SkippedFile, scan_image_folder
from siamese_deploy.metrics import VerificationMetrics, verification_metrics
from siamese_deploy.pairs import Pairs, sample_pairs
from siamese_deploy.verifier import Scores, Verifier


@dataclass(frozen=True)
class Evaluation:
    folder: ImageFolder
    pairs: Pairs
    """The pairs that were scored, in order; those with an unreadable picture are left out."""
    scores: Scores
    """(n_pairs,) float32 in [0, 1]."""
    metrics: VerificationMetrics
    pair_digest: str
    """SHA-256 (hex) of the scored pairs; two evaluations compare only where it is equal."""
    pairs_skipped: int
    skipped: tuple[SkippedFile, ...]
    """Files left out by the scan and pictures that could not be read."""


def evaluate_folder(
    verifier: Verifier,
    root: str | os.PathLike[str],
    *,
    seed: int = 1,
    cache: EmbeddingCache | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Sample the seeded pair list of `root` and evaluate it; pictures that `cache` knows are not embedded again.

    Raises:
        InputDataError: no such folder, too few classes or pictures, or none readable.
        IntegrityError: the network gives NaN.
    """
    folder = scan_image_folder(root)
    return evaluate_pairs(verifier, folder, sample_pairs(folder, seed), cache=cache, show_progress=show_progress)


def evaluate_pairs(
    verifier: Verifier,
    folder: ImageFolder,
    pairs: Pairs,
    *,
    cache: EmbeddingCache | None = None,
    show_progress: bool = False,
) -> Evaluation:
    embeddings = embed_images(verifier, folder, pairs.unique_images(), cache=cache, show_progress=show_progress)
    return evaluate_embedded(verifier, folder, pairs, embeddings)


def evaluate_embedded(verifier: Verifier, folder: ImageFolder, pairs: Pairs, embeddings: ImageEmbeddings) -> Evaluation:
    """`evaluate_pairs` of pictures that are embedded already."""
    scored = pairs.where(embeddings.has_both(pairs))
    if len(scored) == 0:
        raise InputDataError(f"{folder.root}: no pair is left after {len(embeddings.skipped)} unreadable pictures")
    scores = score_pairs(verifier, embeddings, scored)
    return Evaluation(
        folder=folder,
        pairs=scored,
        scores=scores,
        metrics=verification_metrics(scores, scored.is_same),
        pair_digest=scored.digest(folder),
        pairs_skipped=len(pairs) - len(scored),
        skipped=folder.skipped + embeddings.skipped,
    )
