"""Pictures -> embeddings, each once; reading and decoding overlap inference, and a known picture costs neither."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from siamese_deploy.embedding_cache import EmbeddingCache, embedding_key
from siamese_deploy.errors import ImageError, InputDataError, IntegrityError
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.pairs import PairList, Pairs
from siamese_deploy.preprocess import Picture, decode_bytes, load_image, read_picture_file, resize_image
from siamese_deploy.providers import usable_cores
from siamese_deploy.verifier import Embeddings, Images, Scores, Verifier

SCORE_CHUNK_PAIRS = 2048
_BATCHES_AHEAD = 2
# Every write to the cache waits for the disk.
_KEEP_AT_ONCE = 256

T = TypeVar("T")
_Work: TypeAlias = "list[Future[None]]"


@dataclass
class EmbeddedPicture:
    """One picture on its way; in the end it has a `vector`, or a `reason` why there is none."""

    picture: Picture
    sha256: bytes = b""
    """Of the file's bytes; empty for a Pillow image or an array."""
    vector: Embeddings | None = None
    """(dim,) float32, finite."""
    reason: str = ""
    code: str = ""
    """Of the reason."""
    from_cache: bool = False
    data: bytes | None = None
    pixels: Images | None = None

    @property
    def name(self) -> str:
        return os.fspath(self.picture) if isinstance(self.picture, str | os.PathLike) else "<picture>"


_Embedded: TypeAlias = "tuple[list[EmbeddedPicture], list[EmbeddedPicture], Embeddings]"


def embed_pictures(
    verifier: Verifier, pictures: Iterable[Picture], *, cache: EmbeddingCache | None = None
) -> Iterator[list[EmbeddedPicture]]:
    """Embed pictures in order, a batch at a time; pictures that cannot be read come with their reason.

    Pictures that are files, or their bytes, and are in `cache` are neither decoded nor embedded.

    Raises:
        IntegrityError: the network answered with NaN or infinity.
        UsageError: one of them is no `Picture`.
    """
    to_keep: list[EmbeddedPicture] = []
    try:
        for batch, new, vectors in _embedded(verifier, _read_and_decoded(verifier, pictures, cache)):
            for item, vector in zip(new, vectors, strict=True):
                if not np.isfinite(vector).all():
                    raise IntegrityError(
                        f"{item.name}: the network gives no finite embedding (NaN or infinity)", code="not-finite"
                    )
                item.vector, item.pixels = vector, None
            if cache is not None:
                to_keep += [item for item in new if item.sha256]
            yield batch
            if cache is not None and len(to_keep) >= _KEEP_AT_ONCE:
                _keep(cache, verifier, to_keep)
                to_keep = []
    finally:  # also where the caller stops early
        if cache is not None:
            _keep(cache, verifier, to_keep)


def _embedded(verifier: Verifier, batches: Iterator[list[EmbeddedPicture]]) -> Iterator[_Embedded]:
    """Each batch in order, those of it that were embedded, and their embeddings."""

    def embed(batch: list[EmbeddedPicture]) -> _Embedded:
        new = [item for item in batch if item.pixels is not None]
        pixels = [item.pixels for item in new if item.pixels is not None]
        return (
            batch,
            new,
            verifier.embed(np.stack(pixels)) if new else np.empty((0, verifier.embedding_dim), np.float32),
        )

    if verifier.calls_at_once == 1:  # in this thread, as on a GPU every new one would get handles of its own
        yield from map(embed, batches)
        return
    # Threads that do not wait for each other: halves of one batch never take equally long.
    threads = ThreadPoolExecutor(verifier.calls_at_once)
    running: deque[Future[_Embedded]] = deque()
    try:
        for batch in batches:
            running.append(threads.submit(embed, batch))
            if len(running) > verifier.calls_at_once + 1:  # one waits for the first thread that is free
                yield running.popleft().result()
        for work in running:
            yield work.result()
    finally:
        threads.shutdown(cancel_futures=True)


def require_signal(name: str, vector: Embeddings) -> None:
    """Before a decision: the product with zeros is zero, so such a picture would be as like one person as another.

    Raises:
        IntegrityError: all numbers of the embedding are zero.
    """
    if not vector.any():
        raise IntegrityError(
            f"{name}: the network gives an embedding of zeros, which tells nobody from another", code="no-signal"
        )


@dataclass(frozen=True)
class ImageEmbeddings:
    vectors: Embeddings
    """(n_embedded, dim) float32."""
    row_of_image: npt.NDArray[np.int64]
    """(n_images,) row in `vectors` of each picture of the folder; -1 where there is none."""
    skipped: tuple[SkippedFile, ...]
    """Pictures that were asked for and could not be read."""
    from_cache: int = 0
    """Of the embeddings, those that were known already."""


def embed_images(
    verifier: Verifier,
    folder: ImageFolder,
    images: npt.NDArray[np.int64],
    *,
    cache: EmbeddingCache | None = None,
    after_batch: Callable[[ImageEmbeddings, int], None] | None = None,
    show_progress: bool = False,
) -> ImageEmbeddings:
    """Embed each of the pictures `images` (indices into folder.paths) once; unreadable ones are skipped and listed.

    Args:
        after_batch: called after each batch with what there is so far and how many of `images` are done with.

    Raises:
        InputDataError: not one of the pictures can be read.
        EnvironmentFault: pictures can no longer be read because the folder is gone.
        IntegrityError: the network answered with NaN or infinity.
    """
    vectors = np.empty((len(images), verifier.embedding_dim), dtype=np.float32)
    row_of_image = np.full(len(folder), -1, dtype=np.int64)
    n_rows = 0
    skipped: list[SkippedFile] = []
    from_cache = 0
    remaining = iter(images.tolist())
    with (
        interrupts_held() as let_interrupts_through,
        tqdm(total=len(images), desc="embedding", unit="image", disable=not show_progress) as progress,
    ):
        paths = (folder.absolute_path(image) for image in images.tolist())
        for batch in embed_pictures(verifier, paths, cache=cache):
            for item, image in zip(batch, remaining, strict=False):
                if item.vector is None:
                    skipped.append(SkippedFile(folder.paths[image], item.reason, item.code))
                else:
                    vectors[n_rows] = item.vector
                    row_of_image[image] = n_rows
                    n_rows += 1
                    from_cache += item.from_cache
            progress.update(len(batch))
            if after_batch:
                so_far = ImageEmbeddings(vectors[:n_rows], row_of_image, tuple(skipped), from_cache)
                after_batch(so_far, n_rows + len(skipped))
            let_interrupts_through()
    if skipped:
        folder.require_still_there()
    if not n_rows:
        reason = f" ({skipped[0].reason}, ...)" if skipped else ""
        raise InputDataError(f"{folder.root}: none of {len(images)} pictures can be read{reason}", code="no-pictures")
    return ImageEmbeddings(vectors[:n_rows], row_of_image, tuple(skipped), from_cache)


def score_chunks(verifier: Verifier, embeddings: ImageEmbeddings, pairs: PairList) -> Iterator[tuple[Pairs, Scores]]:
    """The pairs in order, SCORE_CHUNK_PAIRS at a time, each chunk with its (P,) float32 scores.

    Raises:
        IntegrityError: a score is NaN or outside [0, 1].
    """
    # The same two arrays for each chunk: fresh ones cost as much as the head itself.
    room = (min(SCORE_CHUNK_PAIRS, len(pairs)), embeddings.vectors.shape[1])
    left, right = np.empty(room, np.float32), np.empty(room, np.float32)
    for chunk in pairs.chunks(SCORE_CHUNK_PAIRS):
        for side, images in ((left, chunk.left), (right, chunk.right)):
            rows = embeddings.row_of_image[images]
            # "clip" is the mode that writes into `out` without a copy; no row is out of range.
            embeddings.vectors.take(rows, axis=0, out=side[: len(chunk)], mode="clip")
        scores = verifier.score(left[: len(chunk)], right[: len(chunk)])
        if not ((scores >= 0) & (scores <= 1)).all():
            raise IntegrityError(
                "the network gives scores that are NaN or outside [0, 1]; the model is damaged", code="not-finite"
            )
        yield chunk, scores


def _read_and_decoded(
    verifier: Verifier, pictures: Iterable[Picture], cache: EmbeddingCache | None
) -> Iterator[list[EmbeddedPicture]]:
    """Batches in order; while one is in the network, threads read and decode the next (Pillow releases the GIL)."""

    def decode(item: EmbeddedPicture) -> None:
        try:
            if item.data is not None:
                item.pixels = resize_image(decode_bytes(item.data, item.name), verifier.preprocess.size_hw)
            else:
                item.pixels = load_image(item.picture, verifier.preprocess)
        except ImageError as error:
            item.reason, item.code = error.reason, error.code
        item.data = None

    def look_up(batch: list[EmbeddedPicture]) -> list[EmbeddedPicture]:
        """Those that have to be decoded."""
        keyed = [item for item in batch if item.sha256]
        if cache is not None and keyed:
            keys = _keys(verifier, keyed)
            known = cache.get_many(keys, verifier.embedding_dim)
            for item, key in zip(keyed, keys, strict=True):
                item.vector = known.get(key)
                item.from_cache = item.vector is not None
        return [item for item in batch if item.vector is None and not item.reason]

    # Starts a thread when there is work for it: one picture pays for one.
    threads = ThreadPoolExecutor(usable_cores())

    def start(work: Callable[[EmbeddedPicture], None], items: list[EmbeddedPicture]) -> _Work:
        return [threads.submit(work, item) for item in items]

    def start_decoding(batch: list[EmbeddedPicture]) -> tuple[list[EmbeddedPicture], _Work]:
        return batch, start(decode, look_up(batch))

    read: deque[tuple[list[EmbeddedPicture], _Work]] = deque()
    decoded: deque[tuple[list[EmbeddedPicture], _Work]] = deque()
    try:
        for part in _batched(pictures, verifier.batch_size):
            batch = [EmbeddedPicture(_loaded(picture)) for picture in part]
            read.append((batch, start(_read, batch)))
            if len(read) > 1:
                decoded.append(start_decoding(_finished(*read.popleft())))
            if len(decoded) > _BATCHES_AHEAD:
                yield _finished(*decoded.popleft())
        decoded.extend(start_decoding(_finished(*waiting)) for waiting in read)
        for waiting in decoded:
            yield _finished(*waiting)
    finally:
        threads.shutdown(cancel_futures=True)


def _loaded(picture: Picture) -> Picture:
    """A Pillow image is read from its file here: it may come twice, and two threads may not read it at once."""
    if isinstance(picture, Image.Image):
        with contextlib.suppress(Exception):  # whoever decodes it says what is wrong
            picture.load()
    return picture


def _read(item: EmbeddedPicture) -> None:
    if isinstance(item.picture, bytes | bytearray | memoryview):
        item.data = bytes(item.picture)
    elif isinstance(item.picture, str | os.PathLike):
        try:
            item.data = read_picture_file(item.picture)
        except ImageError as error:
            item.reason, item.code = error.reason, error.code
    if item.data is not None:
        item.sha256 = hashlib.sha256(item.data).digest()


def _finished(batch: list[EmbeddedPicture], work: _Work) -> list[EmbeddedPicture]:
    for part in work:
        part.result()
    return batch


def _keep(cache: EmbeddingCache, verifier: Verifier, items: list[EmbeddedPicture]) -> None:
    embedded = [item for item in items if item.vector is not None]
    if embedded:
        cache.put_many(
            _keys(verifier, embedded), np.stack([item.vector for item in embedded if item.vector is not None])
        )


def _keys(verifier: Verifier, items: Sequence[EmbeddedPicture]) -> list[bytes]:
    return [
        embedding_key(
            item.sha256,
            model_digest=verifier.model_digest,
            backend=verifier.backend,
            provider=verifier.provider,
            runtime_version=verifier.runtime_version,
            preprocess=verifier.preprocess,
        )
        for item in items
    ]


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
