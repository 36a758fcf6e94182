"""One picture per pair, drawn by threads: while later pictures are still being embedded, as far as that can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from siamese_deploy.durable_files import fsync_path
from siamese_deploy.embedding import ImageEmbeddings
from siamese_deploy.errors import ImageError
from siamese_deploy.evaluate import Evaluation
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.metrics import accepted
from siamese_deploy.pair_picture import image_tile, missing_tile, pair_picture, write_png
from siamese_deploy.pairs import PairList, Pairs
from siamese_deploy.providers import usable_cores
from siamese_deploy.verifier import Scores, Verifier

DRAWN_BY_DEFAULT = 5000
"""Where nothing else is said, a picture is drawn of each pair if there are at most so many, else of none."""
_TILES_IN_MEMORY = 512


def draw_pair(evaluation: Evaluation, pair: int) -> Image.Image:
    """The picture of one scored pair."""
    folder, one = evaluation.folder, evaluation.pairs.take(np.array([pair]))
    return _draw(folder, one, float(evaluation.scores[pair]), evaluation.metrics.threshold, partial(tile, folder))


def tile(folder: ImageFolder, image: int) -> Image.Image:
    """The thumbnail of a picture of the folder; an empty one where the file cannot be read any more."""
    try:
        return image_tile(folder.absolute_path(image))
    except ImageError:  # readable when it was embedded, gone since: its score stands
        return missing_tile()


class PairDrawing:
    """Draws into `staging` pictures k.png, with k the row of the pair in pairs.csv (from 0).

    Args:
        images: pairs to draw: "all", "errors" (wrong at the verifier's threshold), "none", or the first so many; None:
            "all" of at most DRAWN_BY_DEFAULT, or "none".
    """

    def __init__(
        self, staging: Path, folder: ImageFolder, pairs: PairList, verifier: Verifier, images: str | int | None
    ) -> None:
        self._staging, self._folder, self._pairs, self._verifier = staging, folder, pairs, verifier
        if images is None:
            images = "all" if len(pairs) <= DRAWN_BY_DEFAULT else "none"
        self._images = images
        self._tile = lru_cache(maxsize=_TILES_IN_MEMORY)(partial(tile, folder))
        self._early: dict[int, tuple[np.float32, AsyncResult[None]]] = {}
        self._waiting = np.empty(0, np.int64)
        if isinstance(pairs, Pairs) and images != "none" and len(pairs) <= DRAWN_BY_DEFAULT:
            position = np.zeros(len(folder), np.int64)
            position[pairs.unique_images()] = np.arange(len(pairs.unique_images()))
            complete_after = np.maximum(position[pairs.left], position[pairs.right]) + 1
            self._waiting = np.argsort(complete_after, kind="stable")
            self._complete_after = complete_after[self._waiting]

    def __enter__(self) -> PairDrawing:
        self._threads = ThreadPool(usable_cores())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.terminate()  # no thread may still write into the folder when the caller removes it
        self._threads.join()

    def draw_early(self, embeddings: ImageEmbeddings, done: int) -> None:
        """Start to draw the pairs whose two pictures are among the first `done` (see `embed_images`)."""
        n_complete = int(np.searchsorted(self._complete_after, done, side="right")) if len(self._waiting) else 0
        numbers, self._waiting = self._waiting[:n_complete], self._waiting[n_complete:]
        if n_complete == 0:
            return
        self._complete_after = self._complete_after[n_complete:]
        if isinstance(self._images, int):
            numbers = numbers[numbers < self._images]
        rows = [embeddings.row_of_image[side] for side in _sides(self._pairs.take(numbers))]
        usable = (rows[0] >= 0) & (rows[1] >= 0)
        numbers = numbers[usable]
        if len(numbers) == 0:
            return
        scores = self._verifier.score(*(embeddings.vectors[side[usable]] for side in rows))
        for k in np.flatnonzero(self._wanted(self._pairs.take(numbers), numbers, scores)).tolist():
            number = int(numbers[k])
            self._early[number] = scores[k], self._threads.apply_async(self._save, (number, float(scores[k])))

    def finish(self, evaluation: Evaluation, *, show_progress: bool = False) -> int:
        """Draw what is missing; returns the number of pictures.

        What was drawn early stays where it has the very score that the evaluation found.
        """
        numbers = np.empty(0, np.int64) if self._images == "none" else np.arange(len(evaluation.pairs))
        wanted, start = [], 0
        for pairs, scores in evaluation.chunks() if len(numbers) else ():
            here = numbers[start : start + len(pairs)]
            wanted.append(here[self._wanted(pairs, here, scores)])
            start += len(pairs)
        drawn = np.concatenate(wanted).tolist() if wanted else []
        with interrupts_held() as let_interrupts_through:
            for _, work in self._early.values():
                while not work.ready():
                    work.wait(0.1)
                    let_interrupts_through()
                work.get()
            good = set()
            if evaluation.pairs_skipped == 0:  # else the numbers have moved
                good = {k for k, (score, _) in self._early.items() if score == evaluation.scores[k]} & set(drawn)
            for number in self._early.keys() - good:
                (self._staging / f"{number}.png").unlink()
            self._pairs = evaluation.pairs
            missing = [number for number in drawn if number not in good]
            jobs = self._threads.imap_unordered(lambda k: self._save(k, float(evaluation.scores[k])), missing)
            for _ in tqdm(jobs, total=len(missing), desc="drawing", unit="pair", disable=not show_progress):
                let_interrupts_through()
        return len(drawn)

    def _wanted(self, pairs: Pairs, numbers: npt.NDArray[np.int64], scores: Scores) -> npt.NDArray[np.bool_]:
        if isinstance(self._images, int):
            return numbers < self._images
        if self._images == "errors":
            wrong: npt.NDArray[np.bool_] = accepted(scores, self._verifier.threshold) != pairs.is_same
            return wrong
        return np.full(len(pairs), self._images == "all")

    def _save(self, number: int, score: float) -> None:
        pair = self._pairs.take(np.array([number]))
        picture = _draw(self._folder, pair, score, self._verifier.threshold, self._tile)
        path = self._staging / f"{number}.png"
        write_png(picture, path)
        fsync_path(path)  # as the folder's publication would, one file after the other, with nothing else to do


def _sides(pairs: Pairs) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return pairs.left, pairs.right


def _draw(
    folder: ImageFolder, pair: Pairs, score: float, threshold: float, tile_of: Callable[[int], Image.Image]
) -> Image.Image:
    left, right = int(pair.left[0]), int(pair.right[0])
    classes = folder.class_name(left), folder.class_name(right)
    return pair_picture(tile_of(left), tile_of(right), classes, score, bool(pair.is_same[0]), threshold)
