"""Evaluation -> report.html, metrics.json, pairs.csv, skipped.csv and one picture per pair, in a staging folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from siamese_deploy.comparison import Comparison
from siamese_deploy.confusions import Confusions, WorstPair
from siamese_deploy.errors import ImageError
from siamese_deploy.evaluate import Evaluation
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.metrics import accepted
from siamese_deploy.metrics_file import metrics_text
from siamese_deploy.pair_picture import image_tile, missing_tile, pair_picture, side_by_side
from siamese_deploy.pairs_csv import skipped_csv, write_pairs_csv
from siamese_deploy.providers import usable_cores
from siamese_deploy.report_page import Example, report_page

_TILES_IN_MEMORY = 512
DRAWN_BY_DEFAULT = 5000
"""Where nothing else is said, a picture is drawn of each pair if there are at most so many, else of none."""


def write_report(
    staging: Path,
    evaluation: Evaluation,
    metrics: dict[str, Any],
    *,
    images: str | int | None = None,
    comparison: Comparison | None = None,
    show_progress: bool = False,
) -> int:
    """Write all files of an evaluation into the empty folder `staging`.

    Args:
        metrics: the content of metrics.json.
        images: pairs to draw, as pictures k.png with k the row in pairs.csv (from 0): "all", "errors" (wrong at the
            threshold of the metrics), "none", or the first so many; None: "all" of at most DRAWN_BY_DEFAULT, or "none".

    Returns:
        Number of pictures drawn.
    """
    write_pairs_csv(staging / "pairs.csv", evaluation)
    if evaluation.skipped:
        (staging / "skipped.csv").write_bytes(skipped_csv(evaluation.skipped))
    if comparison is not None:
        (staging / "comparison.json").write_text(metrics_text(comparison.content()), encoding="utf-8")
        (staging / "flips.csv").write_bytes(comparison.flips_csv())
    drawn = _pairs_to_draw(evaluation, images)
    _write_pictures(staging, evaluation, drawn, show_progress)
    (staging / "report.html").write_text(_page(evaluation, metrics), encoding="utf-8")
    (staging / "metrics.json").write_text(metrics_text(metrics), encoding="utf-8")
    return len(drawn)


def _page(evaluation: Evaluation, metrics: dict[str, Any]) -> str:
    confusions = Confusions(evaluation.folder, evaluation.metrics.threshold)
    for pairs, scores in evaluation.chunks():
        confusions.add(pairs, scores)

    def example(pair: WorstPair) -> Example:
        folder = evaluation.folder
        return Example(
            left=folder.paths[pair.left],
            right=folder.paths[pair.right],
            left_class=folder.class_name(pair.left),
            right_class=folder.class_name(pair.right),
            score=pair.score,
            picture=side_by_side(_tile(folder, pair.left), _tile(folder, pair.right)),
        )

    return report_page(
        metrics,
        evaluation.counts,
        confusions.rows(),
        [example(pair) for pair in confusions.worst_accepts],
        [example(pair) for pair in confusions.worst_rejects],
    )


def draw_pair(evaluation: Evaluation, pair: int, tile: Callable[[int], Image.Image] | None = None) -> Image.Image:
    """The picture of one scored pair; `tile` gives the thumbnail of a picture of the folder, from its file if None."""
    folder, one = evaluation.folder, evaluation.pairs.take(np.array([pair]))
    left, right = int(one.left[0]), int(one.right[0])
    tile = tile or partial(_tile, folder)
    return pair_picture(
        tile(left),
        tile(right),
        (folder.class_name(left), folder.class_name(right)),
        float(evaluation.scores[pair]),
        bool(one.is_same[0]),
        evaluation.metrics.threshold,
    )


def _tile(folder: ImageFolder, image: int) -> Image.Image:
    try:
        return image_tile(folder.absolute_path(image))
    except ImageError:  # readable when it was embedded, gone since: its score stands
        return missing_tile()


def _pairs_to_draw(evaluation: Evaluation, images: str | int | None) -> list[int]:
    n = len(evaluation.pairs)
    if images is None:
        images = "all" if n <= DRAWN_BY_DEFAULT else "none"
    if isinstance(images, int):
        return list(range(min(images, n)))
    if images == "errors":
        wrong: list[int] = []
        start = 0
        for pairs, scores in evaluation.chunks():
            here = np.flatnonzero(accepted(scores, evaluation.metrics.threshold) != pairs.is_same)
            wrong += (here + start).tolist()
            start += len(pairs)
        return wrong
    return list(range(n)) if images == "all" else []


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
