"""`siamese-eval`, also `siamese eval`: a bundle on a folder of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siamese_deploy.cli.command import PATH, SEED, Command
from siamese_deploy.errors import one_line
from siamese_deploy.providers import CHOICES

if TYPE_CHECKING:
    from siamese_deploy.verifier import Verifier


@click.command(cls=Command, name="eval")
@click.option("-v", "--val_path", required=True, type=PATH, help="Folder: one sub-folder a class.")
@click.option("-o", "--out_path", required=True, type=PATH, help="Folder for metrics, pairs and pictures.")
@click.option("-c", "--checkpoint", "bundle", required=True, type=PATH, help="Bundle folder.")
@click.option(
    "--provider",
    type=click.Choice(CHOICES),
    default="auto",
    help="Where to run. A named one runs there or fails; auto takes CUDA where it truly starts, else the CPU.",
)
@click.option("--seed", type=SEED, default=1, help="Seed of the pair list.")
def main(val_path: Path, out_path: Path, bundle: Path, provider: str, seed: int) -> None:
    """Evaluate a bundle with ONNX Runtime: loss, accuracy, pairs.csv and one picture per pair."""

    def open_verifier() -> Verifier:
        from siamese_deploy.runtime import OnnxVerifier

        verifier = OnnxVerifier(bundle, provider=provider)
        note = f"; {verifier.provider_note}" if verifier.provider_note else ""
        click.echo(one_line(f"provider: {verifier.provider} (onnxruntime{note})"))
        return verifier

    evaluate_into(open_verifier, val_path, out_path, seed)


def evaluate_into(open_verifier: Callable[[], Verifier], val_path: Path, out_path: Path, seed: int) -> None:
    """Evaluate, write the report into `out_path` and print the summary; shared with siamese-train-eval."""
    from siamese_deploy.evaluate import evaluate_folder
    from siamese_deploy.report import write_report
    from siamese_deploy.result_folder import refuse_inside, result_folder

    refuse_inside(out_path, val_path)
    show_progress = sys.stderr.isatty()
    with result_folder(out_path) as staging:
        verifier = open_verifier()
        evaluation = evaluate_folder(verifier, val_path, seed=seed, show_progress=show_progress)
        write_report(staging, evaluation, verifier, seed=seed, show_progress=show_progress)
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
    click.echo(one_line(f"written: {out_path}/metrics.json, pairs.csv and {metrics.pairs} pair pictures"))
