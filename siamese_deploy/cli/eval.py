"""`siamese-eval`, also `siamese eval`: a bundle on a folder of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH, SEED, Command
from siamese_deploy.cli.runtime_options import RuntimeOptions, describe, report_cache, runtime_options
from siamese_deploy.errors import one_line

if TYPE_CHECKING:
    from siamese_deploy.embedding_cache import EmbeddingCache
    from siamese_deploy.verifier import Verifier


class _ImagesToDraw(click.ParamType[str | int]):
    name = "all|errors|none|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        text = str(value)
        if text in ("all", "errors", "none"):
            return text
        if text.isascii() and text.isdigit():
            return int(text)
        self.fail(f"{value!r}: expected all, errors, none or a number", param, ctx)


IMAGES = click.option(
    "--images", type=_ImagesToDraw(), default="all", help="Pairs to draw: all, errors, none, or the first N."
)


@click.command(cls=Command, name="eval")
@click.option("-v", "--val_path", required=True, type=PATH, help="Folder: one sub-folder a class.")
@click.option("-o", "--out_path", required=True, type=PATH, help="Folder for metrics, pairs and pictures.")
@runtime_options
@click.option("--seed", type=SEED, default=1, help="Seed of the pair list.")
@IMAGES
def main(val_path: Path, out_path: Path, runtime: RuntimeOptions, seed: int, images: str | int) -> None:
    """Evaluate a bundle with ONNX Runtime: loss, accuracy, pairs.csv and one picture per pair."""
    cache = runtime.open_cache()

    def open_verifier() -> Verifier:
        verifier = runtime.open_verifier(cache, throughput=True)
        click.echo(describe(verifier))
        return verifier

    evaluate_into(open_verifier, val_path, out_path, seed, images=images, cache=cache)
    report_cache(cache)


def evaluate_into(
    open_verifier: Callable[[], Verifier],
    val_path: Path,
    out_path: Path,
    seed: int,
    *,
    images: str | int = "all",
    cache: EmbeddingCache | None = None,
) -> None:
    """Evaluate, write the report into `out_path` and print the summary; shared with siamese-train-eval."""
    from siamese_deploy.evaluate import evaluate_folder
    from siamese_deploy.report import write_report
    from siamese_deploy.result_folder import refuse_inside, result_folder

    refuse_inside(out_path, val_path)
    show_progress = sys.stderr.isatty()
    with result_folder(out_path) as staging:
        verifier = open_verifier()
        evaluation = evaluate_folder(verifier, val_path, seed=seed, cache=cache, show_progress=show_progress)
        drawn = write_report(staging, evaluation, verifier, seed=seed, images=images, show_progress=show_progress)
    metrics = evaluation.metrics
    if evaluation.skipped:
        first = evaluation.skipped[0]
        click.echo(
            one_line(
                f"skipped {len(evaluation.skipped)} files and {evaluation.pairs_skipped} pairs "
                f"(first: {first.path}: {first.reason}); see {out_path / 'skipped.csv'}"
            ),
            err=True,
        )
    roc_auc = "undefined" if metrics.roc_auc is None else f"{metrics.roc_auc:.4f}"
    click.echo(f"pairs: {metrics.pairs} ({metrics.same_pairs} same), seed {seed}")
    click.echo(f"pair digest: {evaluation.pair_digest}")
    click.echo(f"loss: {metrics.loss:.4f}  accuracy: {metrics.accuracy:.4f}  ROC AUC: {roc_auc}")
    click.echo(one_line(f"written: {out_path}/metrics.json, pairs.csv and {drawn} pair pictures"))
