"""What one query is. Each scenario answers with the scores it got, so that nothing is timed that is wrong."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from siamese_deploy.embedding import embed_images, score_chunks
from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.pairs import Pairs
from siamese_deploy.preprocess import decode_bytes, load_image, read_picture_file, resize_image
from siamese_deploy.verifier import Embeddings, Images, Scores, Verifier

STAGES = ("read", "decode", "resize", "copy", "backbone", "head")
MULTI_STREAM_PAIRS = 8
CACHED_PAIRS = 8192
"""Pairs in one run of the head."""
WORKING_SET_ROWS = 8192
"""Different rows of a synthetic gallery; a larger one goes over them again."""
_GROUPS_AHEAD = 2


class BenchVerifier(Verifier, Protocol):
    """A verifier that can also keep a gallery where its head runs."""

    def place(self, embeddings: Embeddings) -> Any:
        """(P, dim) -> what `score_placed` takes, as often as one likes and without a copy."""
        ...

    def score_placed(self, left: Any, right: Any) -> Scores:
        """As `score`, of what `place` gave."""
        ...


@dataclass(frozen=True)
class Workload:
    """Real pairs, and what an evaluation says about them."""

    paths: tuple[Path, ...]
    """(2 * n_pairs,) left, right, left, right, ..."""
    left: Embeddings
    """(n_pairs, dim)"""
    right: Embeddings
    """(n_pairs, dim)"""
    expected: Scores
    """(n_pairs,)"""
    score: Callable[[Embeddings, Embeddings], Scores]
    """Of the verifier that evaluated them."""

    def __len__(self) -> int:
        return len(self.expected)


@dataclass(frozen=True)
class Answer:
    scores: Scores
    """(n,)"""
    expected: Scores
    """(n,)"""
    stages_ns: tuple[int, ...] = field(default=())
    """One for each of STAGES, where the scenario tells them apart."""


Query = Callable[[int], Answer]


def make_workload(verifier: Verifier, folder: ImageFolder, pairs: Pairs) -> Workload:
    """Score the pairs as an evaluation does, which also reads every file once; unreadable pictures are left out.

    Raises:
        InputDataError: no pair is left.
        IntegrityError: the network gives NaN.
    """
    embeddings = embed_images(verifier, folder, pairs.unique_images())
    rows = embeddings.row_of_image
    pairs = pairs.among(rows >= 0)
    if not len(pairs):
        raise InputDataError(
            f"{folder.root}: no pair is left after {len(embeddings.skipped)} unreadable pictures", code="no-pairs"
        )
    sides = np.stack([pairs.left, pairs.right], axis=1).ravel().tolist()
    return Workload(
        tuple(folder.absolute_path(image) for image in sides),
        embeddings.vectors[rows[pairs.left]],
        embeddings.vectors[rows[pairs.right]],
        np.concatenate([scores for _, scores in score_chunks(verifier, embeddings, pairs)]),
        verifier.score,
    )


def single_stream(verifier: Verifier, work: Workload) -> Query:
    """A pair: read, decode and resize two pictures in turn, embed them in one run, score them."""
    size_hw = verifier.preprocess.size_hw

    def query(number: int) -> Answer:
        pair = number % len(work)
        paths = work.paths[2 * pair : 2 * pair + 2]
        at = [time.perf_counter_ns()]

        def done() -> None:
            at.append(time.perf_counter_ns())

        data = [read_picture_file(path) for path in paths]
        done()
        pictures = [decode_bytes(item, str(path)) for item, path in zip(data, paths, strict=True)]
        done()
        resized = [resize_image(picture, size_hw) for picture in pictures]
        done()
        images = np.stack(resized)
        done()
        vectors = verifier.embed(images)
        done()
        scores = verifier.score(vectors[:1], vectors[1:])
        done()
        return Answer(scores, work.expected[pair : pair + 1], tuple(np.diff(at).tolist()))

    return query


def multi_stream(verifier: Verifier, work: Workload, threads: Executor) -> Query:
    """MULTI_STREAM_PAIRS pairs: their pictures are prepared by several threads, then embedded and scored together."""

    def load(path: Path) -> Images:
        return load_image(path, verifier.preprocess)

    def query(number: int) -> Answer:
        pairs = np.arange(number * MULTI_STREAM_PAIRS, (number + 1) * MULTI_STREAM_PAIRS) % len(work)
        paths = [work.paths[side] for pair in pairs.tolist() for side in (2 * pair, 2 * pair + 1)]
        vectors = verifier.embed(np.stack(list(threads.map(load, paths))))
        return Answer(verifier.score(vectors[0::2], vectors[1::2]), work.expected[pairs])

    return query


def offline(verifier: Verifier, work: Workload, threads: Executor, group: int) -> Query:
    """`group` pictures of an endless list of pairs; while they are embedded, threads prepare the next ones."""
    ahead: deque[list[Future[Images]]] = deque()
    submitted = scored = 0
    left_over = np.empty((0, verifier.embedding_dim), np.float32)

    def submit() -> None:
        nonlocal submitted
        paths = [work.paths[side % len(work.paths)] for side in range(submitted, submitted + group)]
        ahead.append([threads.submit(load_image, path, verifier.preprocess) for path in paths])
        submitted += group

    def query(_number: int) -> Answer:
        nonlocal scored, left_over
        while len(ahead) <= _GROUPS_AHEAD:
            submit()
        vectors = verifier.embed(np.stack([picture.result() for picture in ahead.popleft()]))
        vectors = np.concatenate([left_over, vectors]) if len(left_over) else vectors
        whole = len(vectors) // 2 * 2
        left_over = vectors[whole:]  # the left picture of a pair whose right one comes next
        scores = verifier.score(vectors[0:whole:2], vectors[1:whole:2])
        pairs = np.arange(scored, scored + len(scores)) % len(work)
        scored += len(scores)
        return Answer(scores, work.expected[pairs])

    return query


def cached_pairs(verifier: Verifier, work: Workload) -> Query:
    """CACHED_PAIRS pairs whose embeddings are in memory already."""
    pairs = np.arange(CACHED_PAIRS) % len(work)
    left, right, expected = work.left[pairs], work.right[pairs], work.expected[pairs]
    return lambda _number: Answer(verifier.score(left, right), expected)


def identify(verifier: BenchVerifier, work: Workload, n_rows: int) -> Query:
    """One embedding against `n_rows` rows, of which WORKING_SET_ROWS at most are different ones."""
    gallery = _synthetic_rows(work, min(n_rows, WORKING_SET_ROWS))
    whole, rest = divmod(n_rows, len(gallery))
    expected = work.score(work.left[:1], gallery)
    placed = verifier.place(gallery)
    chunks = [placed] * whole + ([verifier.place(gallery[:rest])] if rest else [])

    def query(_number: int) -> Answer:
        asked = verifier.place(work.left[:1])
        scores = [verifier.score_placed(asked, chunk) for chunk in chunks]
        return Answer(scores[0], expected)

    return query


def _synthetic_rows(work: Workload, n: int) -> Embeddings:
    """(n, dim): mixtures of two real embeddings each."""
    random = np.random.RandomState(0)
    one, other = ((random.random_sample(n) * len(work)).astype(np.int64) for _ in range(2))
    part: npt.NDArray[np.float32] = random.random_sample((n, 1)).astype(np.float32)
    return part * work.left[one] + (1 - part) * work.right[other]
