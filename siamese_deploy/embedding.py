"""Pictures of a folder -> embeddings, each picture once; decoding overlaps inference."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import MapResult, ThreadPool

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from siamese_deploy.errors import ImageError, InputDataError, IntegrityError
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.pairs import Pairs
from siamese_deploy.preprocess import load_image
from siamese_deploy.providers import usable_cores
from siamese_deploy.verifier import Embeddings, Images, Scores, Verifier

BATCH_SIZE = 16
SCORE_CHUNK_PAIRS = 8192
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageEmbeddings:
    vectors: Embeddings
    """(n_embedded, dim) float32."""
    row_of_image: npt.NDArray[np.int64]
    """(n_images,) row in `vectors` of each picture of the folder; -1 where there is none."""
    skipped: tuple[SkippedFile, ...]
    """Pictures that were asked for and could not be read."""

    def has_both(self, pairs: Pairs) -> npt.NDArray[np.bool_]:
        """(n_pairs,) True where both pictures have an embedding."""
        return (self.row_of_image[pairs.left] >= 0) & (self.row_of_image[pairs.right] >= 0)


def embed_images(
    verifier: Verifier, folder: ImageFolder, images: npt.NDArray[np.int64], *, show_progress: bool = False
) -> ImageEmbeddings:
    """Embed each of the pictures `images` (indices into folder.paths) once; unreadable ones are skipped and listed.

    Raises:
        InputDataError: not one of the pictures can be read.
        IntegrityError: the network answered with NaN or infinity.
    """
    rows: list[Embeddings] = []
    row_of_image = np.full(len(folder), -1, dtype=np.int64)
    skipped: list[SkippedFile] = []
    n_embedded = 0
    with (
        interrupts_held() as let_interrupts_through,
        tqdm(total=len(images), desc="embedding", unit="image", disable=not show_progress) as progress,
    ):
        for batch in _decoded_batches(verifier, folder, images):
            skipped += [SkippedFile(folder.paths[image], reason) for image, _, reason in batch if reason]
            readable = [(image, pixels) for image, pixels, _ in batch if pixels is not None]
            if readable:
                vectors = verifier.embed(np.stack([pixels for _, pixels in readable]))
                finite = np.isfinite(vectors).all(axis=1)
                if not finite.all():
                    first = folder.paths[readable[int(np.argmin(finite))][0]]
                    raise IntegrityError(f"{first}: the network gives no finite embedding (NaN or infinity)")
                row_of_image[[image for image, _ in readable]] = np.arange(n_embedded, n_embedded + len(readable))
                n_embedded += len(readable)
                rows.append(vectors)
            progress.update(len(batch))
            let_interrupts_through()
    if not rows:
        reason = f" ({skipped[0].reason}, ...)" if skipped else ""
        raise InputDataError(f"{folder.root}: none of {len(images)} pictures can be read{reason}")
    return ImageEmbeddings(np.concatenate(rows), row_of_image, tuple(skipped))


def score_pairs(verifier: Verifier, embeddings: ImageEmbeddings, pairs: Pairs) -> Scores:
    """(n_pairs,) float32 scores; memory grows with the chunk, not with the number of pairs.

    Raises:
        IntegrityError: a score is NaN or outside [0, 1].
    """
    left, right = embeddings.row_of_image[pairs.left], embeddings.row_of_image[pairs.right]
    scores = np.empty(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), SCORE_CHUNK_PAIRS):
        chunk = slice(start, start + SCORE_CHUNK_PAIRS)
        scores[chunk] = verifier.score(embeddings.vectors[left[chunk]], embeddings.vectors[right[chunk]])
    if not ((scores >= 0) & (scores <= 1)).all():
        raise IntegrityError("the network gives scores that are NaN or outside [0, 1]; the model is damaged")
    return scores


_Decoded = tuple[int, Images | None, str]  # index of the picture, its pixels or None, why there are none


def _decoded_batches(
    verifier: Verifier, folder: ImageFolder, images: npt.NDArray[np.int64]
) -> Iterator[list[_Decoded]]:
    """Batches in order; while one is in the network, threads decode the next ones (Pillow releases the GIL)."""

    def decode(image: int) -> _Decoded:
        try:
            return image, load_image(folder.absolute_path(image), verifier.preprocess), ""
        except ImageError as error:
            return image, None, error.reason

    batches = (images[i : i + BATCH_SIZE].tolist() for i in range(0, len(images), BATCH_SIZE))
    waiting: deque[MapResult[_Decoded]] = deque()
    with ThreadPool(usable_cores()) as threads:
        for batch in batches:
            waiting.append(threads.map_async(decode, batch, chunksize=1))
            if len(waiting) > _BATCHES_AHEAD:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()
