"""The flow: folder -> pairs -> embeddings -> scores -> metrics; for both backends and for training's validation."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from siamese_deploy.bootstrap import Replicates, bootstrap
from siamese_deploy.embedding import SCORE_CHUNK_PAIRS, ImageEmbeddings, embed_images, score_chunks
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder, SkippedFile, scan_image_folder
from siamese_deploy.metrics import VerificationMetrics, metrics_of_counts
from siamese_deploy.pairs import PairList, Pairs, sample_pairs
from siamese_deploy.score_counts import ScoreCounts, ScoreHistogram
from siamese_deploy.verifier import Scores, Verifier

EXACT_PAIRS = 2**24
"""Up to so many pairs metrics are exact; beyond, they come from a histogram and say how far off they can be."""
SCORES_IN_MEMORY = 2**26
"""Beyond so many pairs their scores lie in an unnamed file in the folder for temporary files."""


@dataclass(frozen=True)
class Evaluation:
    folder: ImageFolder
    pairs: PairList
    """The pairs that were scored, in order; those with an unreadable picture are left out."""
    scores: Scores
    """(n_pairs,) float32 in [0, 1]."""
    counts: ScoreCounts
    metrics: VerificationMetrics
    pair_digest: str
    """SHA-256 (hex) of the scored pairs; two evaluations compare only where it is equal."""
    pairs_skipped: int
    skipped: tuple[SkippedFile, ...]
    """Files left out by the scan and pictures that could not be read."""
    images_embedded: int
    images_from_cache: int
    embed_s: float
    score_s: float

    def chunks(self, size: int = SCORE_CHUNK_PAIRS) -> Iterator[tuple[Pairs, Scores]]:
        """The pairs and their scores in order, at most `size` at a time."""
        start = 0
        for chunk in self.pairs.chunks(size):
            yield chunk, self.scores[start : start + len(chunk)]
            start += len(chunk)


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
    pairs: PairList,
    *,
    strict: bool = False,
    cache: EmbeddingCache | None = None,
    after_batch: Callable[[ImageEmbeddings, int], None] | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Embed the pictures of `pairs`, score the pairs, and compute the metrics at the verifier's threshold.

    Args:
        strict: do not leave out what cannot be read.
        after_batch: see `embed_images`.

    Raises:
        InputDataError: no pair is left, or `strict` and a picture or folder cannot be read.
        IntegrityError: the network gives NaN.
    """
    started = time.perf_counter()
    images = pairs.unique_images()
    embeddings = embed_images(
        verifier, folder, images, cache=cache, after_batch=after_batch, show_progress=show_progress
    )
    embed_s = time.perf_counter() - started
    skipped = folder.skipped + embeddings.skipped
    if strict and skipped:
        raise InputDataError(
            f"{folder.root}: {len(skipped)} files or folders cannot be used, and --strict allows none "
            f"(first: {skipped[0].path}: {skipped[0].reason})"
        )
    return evaluate_embedded(verifier, folder, pairs, embeddings, embed_s=embed_s, show_progress=show_progress)


def evaluate_embedded(
    verifier: Verifier,
    folder: ImageFolder,
    pairs: PairList,
    embeddings: ImageEmbeddings,
    *,
    embed_s: float = 0.0,
    show_progress: bool = False,
) -> Evaluation:
    """`evaluate_pairs` of pictures that are embedded already."""
    scored = pairs.among(embeddings.row_of_image >= 0)
    if len(scored) == 0:
        raise InputDataError(f"{folder.root}: no pair is left after {len(embeddings.skipped)} unreadable pictures")
    started = time.perf_counter()
    scores, counts = _score(verifier, embeddings, scored, show_progress)
    score_s = time.perf_counter() - started
    return Evaluation(
        folder=folder,
        pairs=scored,
        scores=scores,
        counts=counts,
        metrics=metrics_of_counts(counts, threshold=verifier.threshold),
        pair_digest=scored.digest(folder),
        pairs_skipped=len(pairs) - len(scored),
        skipped=folder.skipped + embeddings.skipped,
        images_embedded=len(embeddings.vectors) - embeddings.from_cache,
        images_from_cache=embeddings.from_cache,
        embed_s=embed_s,
        score_s=score_s,
    )


def resample(evaluation: Evaluation, *, show_progress: bool = False) -> Replicates:
    """What the metrics would be for other draws of the classes; see `bootstrap`."""
    labels = evaluation.folder.labels

    def chunks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_], Scores]]:
        with tqdm(
            total=len(evaluation.pairs), desc="resampling", unit="pair", unit_scale=True, disable=not show_progress
        ) as progress:
            for pairs, scores in evaluation.chunks():
                yield labels[pairs.left], labels[pairs.right], pairs.is_same, scores
                progress.update(len(pairs))

    return bootstrap(
        chunks, evaluation.counts, len(evaluation.folder.class_names), threshold=evaluation.metrics.threshold
    )


def _score(
    verifier: Verifier, embeddings: ImageEmbeddings, pairs: PairList, show_progress: bool
) -> tuple[Scores, ScoreCounts]:
    scores = _room_for_scores(len(pairs))
    histogram = None if len(pairs) <= EXACT_PAIRS else ScoreHistogram()
    done = 0
    with tqdm(total=len(pairs), desc="scoring", unit="pair", unit_scale=True, disable=not show_progress) as progress:
        for chunk, chunk_scores in score_chunks(verifier, embeddings, pairs):
            scores[done : done + len(chunk)] = chunk_scores
            if histogram is not None:
                histogram.add(chunk_scores, chunk.is_same)
            done += len(chunk)
            progress.update(len(chunk))
    return scores, ScoreCounts.of(scores, pairs.is_same) if histogram is None else histogram.counts()


def _room_for_scores(pairs: int) -> Scores:
    if pairs <= SCORES_IN_MEMORY:
        return np.empty(pairs, dtype=np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it; it goes with the process
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(pairs,))
