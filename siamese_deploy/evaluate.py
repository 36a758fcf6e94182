"""The flow: folder -> pairs -> embeddings -> scores -> metrics; for both backends and for training's validation."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from siamese_deploy.embedding import SCORE_CHUNK_PAIRS, ImageEmbeddings, embed_images, score_chunks
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder, SkippedFile, scan_image_folder
from siamese_deploy.metrics import VerificationMetrics, metrics_of_counts
from siamese_deploy.metrics.bootstrap import Replicates, bootstrap
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram
from siamese_deploy.pairs import PairList, Pairs, sample_pairs
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
    asked: PairList
    """The pairs that were asked for."""
    usable: npt.NDArray[np.bool_]
    """(n_images,) whether each picture of the folder has an embedding."""
    skipped: tuple[SkippedFile, ...]
    """Files left out by the scan and pictures that could not be read."""
    images_embedded: int
    images_from_cache: int
    embed_s: float
    score_s: float

    @property
    def pairs_skipped(self) -> int:
        return len(self.asked) - len(self.pairs)

    def skipped_pairs(self) -> Iterator[Pairs]:
        """The pairs that were asked for and not scored, in order, chunk by chunk."""
        size = SCORE_CHUNK_PAIRS // max(self.asked.ways, 1) * max(self.asked.ways, 1)  # episodes go as a whole
        for chunk in self.asked.chunks(size) if self.pairs_skipped else ():
            lost = ~(self.usable[chunk.left] & self.usable[chunk.right])
            if self.asked.ways:
                lost = np.repeat(lost.reshape(-1, self.asked.ways).any(axis=1), self.asked.ways)
            yield chunk.where(lost)

    @cached_property
    def images(self) -> npt.NDArray[np.int64]:
        """(n,) sorted indices of the pictures in the scored pairs."""
        return self.pairs.unique_images()

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
            f"(first: {skipped[0].path}: {skipped[0].reason})",
            code="skipped-files",
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
    usable = embeddings.row_of_image >= 0
    scored = pairs.among(usable)
    if len(scored) == 0:
        raise InputDataError(
            f"{folder.root}: no pair is left after {len(embeddings.skipped)} unreadable pictures", code="no-pairs"
        )
    started = time.perf_counter()
    scores = _score(verifier, embeddings, scored, show_progress)
    score_s = time.perf_counter() - started
    counts = counted(scores, scored)
    return Evaluation(
        folder=folder,
        pairs=scored,
        scores=scores,
        counts=counts,
        metrics=metrics_of_counts(counts, threshold=verifier.threshold),
        pair_digest=scored.digest(folder),
        asked=pairs,
        usable=usable,
        skipped=folder.skipped + embeddings.skipped,
        images_embedded=len(embeddings.vectors) - embeddings.from_cache,
        images_from_cache=embeddings.from_cache,
        embed_s=embed_s,
        score_s=score_s,
    )


def resample(evaluation: Evaluation, *, show_progress: bool = False) -> Replicates:
    """What the metrics would be for other draws of the classes; see `bootstrap`."""
    # Classes that are in no scored pair (all pictures unreadable, say) are none.
    in_use = np.unique(evaluation.folder.labels[evaluation.images])
    labels = np.searchsorted(in_use, evaluation.folder.labels)

    def chunks() -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_], Scores]]:
        with tqdm(
            total=len(evaluation.pairs), desc="resampling", unit="pair", unit_scale=True, disable=not show_progress
        ) as progress:
            for pairs, scores in evaluation.chunks():
                yield labels[pairs.left], labels[pairs.right], pairs.is_same, scores
                progress.update(len(pairs))

    return bootstrap(chunks, evaluation.counts, len(in_use), threshold=evaluation.metrics.threshold)


def _score(verifier: Verifier, embeddings: ImageEmbeddings, pairs: PairList, show_progress: bool) -> Scores:
    scores = room_for_scores(len(pairs))
    done = 0
    with tqdm(total=len(pairs), desc="scoring", unit="pair", unit_scale=True, disable=not show_progress) as progress:
        for chunk, chunk_scores in score_chunks(verifier, embeddings, pairs):
            scores[done : done + len(chunk)] = chunk_scores
            done += len(chunk)
            progress.update(len(chunk))
    return scores


def counted(scores: Scores, pairs: PairList) -> ScoreCounts:
    """Exact for up to EXACT_PAIRS pairs, else from a histogram."""
    if len(pairs) <= EXACT_PAIRS:
        return ScoreCounts.of(scores, pairs.is_same)
    histogram, done = ScoreHistogram(), 0
    for chunk in pairs.chunks(SCORE_CHUNK_PAIRS):
        histogram.add(scores[done : done + len(chunk)], chunk.is_same)
        done += len(chunk)
    return histogram.counts()


def room_for_scores(pairs: int) -> Scores:
    """(pairs,) float32, in memory or in a file.

    Raises:
        OSError: no room for the file.
    """
    if pairs <= SCORES_IN_MEMORY:
        return np.empty(pairs, dtype=np.float32)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it; it goes with the process
        # Without its blocks set aside, a disk that is full later would end the process by a signal.
        os.posix_fallocate(file.fileno(), 0, 4 * pairs)
        return np.memmap(file, dtype=np.float32, mode="r+", shape=(pairs,))
