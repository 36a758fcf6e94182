"""Evaluation -> report.html, metrics.json, pairs.csv and skipped.csv, in a staging folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from siamese_deploy.comparison import Comparison
from siamese_deploy.evaluate import Evaluation
from siamese_deploy.metrics_file import metrics_text
from siamese_deploy.pair_drawing import tile
from siamese_deploy.pair_picture import side_by_side
from siamese_deploy.pairs_csv import skipped_csv, write_pairs_csv, write_skipped_pairs
from siamese_deploy.report_page import Example, report_page
from siamese_deploy.report_page.confusions import Confusions, WorstPair


def write_report(
    staging: Path, evaluation: Evaluation, metrics: dict[str, Any], comparison: Comparison | None = None
) -> None:
    """Write all files of an evaluation but the pictures of pairs into the folder `staging`.

    Args:
        metrics: the content of metrics.json.
    """
    write_pairs_csv(staging / "pairs.csv", evaluation)
    if evaluation.skipped:
        (staging / "skipped.csv").write_bytes(skipped_csv(evaluation.skipped))
    if evaluation.pairs_skipped:
        write_skipped_pairs(staging / "skipped_pairs.csv", evaluation)
    if comparison is not None:
        (staging / "comparison.json").write_text(metrics_text(comparison.content()), encoding="utf-8")
        comparison.write_flips(staging / "flips.csv")
    (staging / "report.html").write_text(_page(evaluation, metrics), encoding="utf-8")
    (staging / "metrics.json").write_text(metrics_text(metrics), encoding="utf-8")


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
            picture=side_by_side(tile(folder, pair.left), tile(folder, pair.right)),
        )

    return report_page(
        metrics,
        evaluation.counts,
        confusions.rows(),
        [example(pair) for pair in confusions.worst_accepts],
        [example(pair) for pair in confusions.worst_rejects],
    )
