"""Evaluation -> pairs.csv, metrics.json, skipped.csv and one picture per pair, in a staging folder."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from siamese_deploy.errors import ImageError
from siamese_deploy.evaluate import Evaluation
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.pair_picture import image_tile, missing_tile, pair_picture
from siamese_deploy.providers import usable_cores
from siamese_deploy.verifier import Verifier

FORMAT = "siamese-evaluation/1"
_TILES_IN_MEMORY = 512


def write_report(
    staging: Path,
    evaluation: Evaluation,
    verifier: Verifier,
    *,
    seed: int,
    images: str | int = "all",
    show_progress: bool = False,
) -> int:
    """Write all files of an evaluation into the empty folder `staging`.

    pairs.csv has the columns left, right, is_same, score in pair order; row k belongs to the picture k.png (from 0).

    Args:
        images: pairs to draw: "all", "errors" (wrong at the threshold of the metrics), "none", or the first so many.

    Returns:
        Number of pictures drawn.
    """
    folder, pairs = evaluation.folder, evaluation.pairs
    rows = [
        (folder.paths[left], folder.paths[right], int(same), shortest_float32(score))
        for left, right, same, score in zip(pairs.left, pairs.right, pairs.is_same, evaluation.scores, strict=True)
    ]
    (staging / "pairs.csv").write_bytes(_csv_bytes(("left", "right", "is_same", "score"), rows))
    if evaluation.skipped:
        (staging / "skipped.csv").write_bytes(skipped_csv(evaluation.skipped))
    drawn = _pairs_to_draw(evaluation, images)
    _write_pictures(staging, evaluation, drawn, show_progress)
    text = json.dumps(_metrics_json(evaluation, verifier, seed), indent=2, allow_nan=False)
    (staging / "metrics.json").write_text(text + "\n", encoding="utf-8")
    return len(drawn)


def shortest_float32(value: np.float32) -> str:
    """The decimal text with the fewest digits that reads back as the same float32."""
    return str(np.float32(value))


def skipped_csv(skipped: Sequence[SkippedFile]) -> bytes:
    """A CSV file of what was left out and why: columns path, reason."""
    return _csv_bytes(("path", "reason"), [(file.path, file.reason) for file in skipped])


def _metrics_json(evaluation: Evaluation, verifier: Verifier, seed: int) -> dict[str, Any]:
    metrics = evaluation.metrics
    return {
        "format": FORMAT,
        "pairs": metrics.pairs,
        "same_pairs": metrics.same_pairs,
        "pair_digest": evaluation.pair_digest,
        "seed": seed,
        "loss": metrics.loss,
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "threshold": metrics.threshold,
        "classes": len(evaluation.folder.class_names),
        "images": len(evaluation.folder),
        "files_skipped": len(evaluation.skipped),
        "pairs_skipped": evaluation.pairs_skipped,
        "backend": verifier.backend,
        "provider": verifier.provider,
        "model_digest": verifier.model_digest,
        "run": {
            "python": platform.python_version(),
            "siamese-toolkit": metadata.version("siamese-toolkit"),
            "numpy": np.__version__,
            "pillow": metadata.version("pillow"),
        },
    }


def _csv_bytes(header: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # surrogateescape: names that are not UTF-8 come out as the bytes they are on the disk.
    return text.getvalue().encode("utf-8", "surrogateescape")


def draw_pair(evaluation: Evaluation, pair: int, tile: Callable[[int], Image.Image] | None = None) -> Image.Image:
    """The picture of one scored pair; `tile` gives the thumbnail of a picture of the folder, from its file if None."""
    folder, pairs = evaluation.folder, evaluation.pairs
    left, right = int(pairs.left[pair]), int(pairs.right[pair])
    tile = tile or partial(_tile, folder)
    return pair_picture(
        tile(left),
        tile(right),
        (folder.class_name(left), folder.class_name(right)),
        float(evaluation.scores[pair]),
        bool(pairs.is_same[pair]),
        evaluation.metrics.threshold,
    )


def _tile(folder: ImageFolder, image: int) -> Image.Image:
    try:
        return image_tile(folder.absolute_path(image))
    except ImageError:  # readable when it was embedded, gone since: its score stands
        return missing_tile()


def _pairs_to_draw(evaluation: Evaluation, images: str | int) -> list[int]:
    if isinstance(images, int):
        return list(range(min(images, len(evaluation.pairs))))
    accepted = evaluation.scores >= evaluation.metrics.threshold
    wanted = {
        "all": np.ones(len(accepted), bool),
        "errors": accepted != evaluation.pairs.is_same,
        "none": np.zeros(len(accepted), bool),
    }[images]
    return [int(pair) for pair in np.flatnonzero(wanted)]


def _write_pictures(staging: Path, evaluation: Evaluation, drawn: list[int], show_progress: bool) -> None:
    if not drawn:
        return
    tile = lru_cache(maxsize=_TILES_IN_MEMORY)(partial(_tile, evaluation.folder))

    def draw(pair: int) -> None:
        draw_pair(evaluation, pair, tile).save(staging / f"{pair}.png", compress_level=1)

    with interrupts_held() as let_interrupts_through, ThreadPool(usable_cores()) as threads:
        finished = threads.imap_unordered(draw, drawn)
        try:
            for _ in tqdm(finished, total=len(drawn), desc="drawing", unit="pair", disable=not show_progress):
                let_interrupts_through()
        finally:  # no thread may still write into the folder when the caller removes it
            threads.terminate()
            threads.join()
