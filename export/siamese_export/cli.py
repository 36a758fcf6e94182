"""`siamese-export`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.errors import UsageError, needs_extra, one_line


def _print_bundle(path: Path) -> None:
    from siamese_deploy.bundle import read_bundle

    bundle = read_bundle(path)
    manifest = bundle.manifest
    height, width = manifest.preprocess.size_hw
    lines = {
        "bundle digest": bundle.digest,
        "backbone": f"{manifest.backbone}, {len(bundle.backbone):,} bytes; head {len(bundle.head):,} bytes",
        "embedding": f"{manifest.embedding_dim} numbers, {manifest.precision}",
        "pictures": f"{width} x {height} px, {manifest.preprocess.resize}",
        "batch": f"{manifest.batch[0]} to {manifest.batch[2]}, best {manifest.batch[1]}",
        "threshold": f"{manifest.threshold:.4f} ({manifest.threshold_origin})",
        "created": manifest.created_utc,
    }
    for name, value in lines.items():
        click.echo(one_line(f"{name + ':':15}{value}"))
    for name, facts in manifest.about.items():
        click.echo(one_line(f"{name + ':':15}{json.dumps(facts, ensure_ascii=False)}"))


@click.command(cls=Command, name="siamese-export")
@click.option("-c", "--checkpoint", type=PATH, help="Checkpoint file (.pth), ours or the reference's.")
@click.option("-o", "--out_path", type=PATH, help="Bundle folder to make; must not exist.")
@click.option(
    "--val_path", type=PATH, help="Validation pictures, for parity, accuracy and threshold; without it, drawn ones."
)
@click.option(
    "--target_far",
    type=float,
    help="False accept rate on VAL_PATH that the threshold is for.  [default: 0.001, if there are pairs enough; else "
    "the threshold is the reference's 0.5]",
)
@click.option("--show", type=PATH, help="Print what is in this bundle instead.")
def main(
    checkpoint: Path | None,
    out_path: Path | None,
    val_path: Path | None,
    target_far: float | None,
    show: Path | None,
) -> None:
    """Export a checkpoint as a bundle of two ONNX graphs, after proving that they answer like PyTorch."""
    if show:
        return _print_bundle(show)
    if checkpoint is None or out_path is None:
        raise UsageError("expected --checkpoint FILE and --out_path FOLDER, or --show BUNDLE (see --help)")
    with needs_extra("export"):
        import onnxscript  # noqa: F401  torch loads it late; if it is missing, say so before any work

        from siamese_export.export import export_checkpoint
        from siamese_export.parity import BATCH_SIZES
    exported = export_checkpoint(checkpoint, out_path, val_path, target_far=target_far)
    parity, accuracy = exported.parity, exported.accuracy
    batches = ", ".join(map(str, BATCH_SIZES))
    click.echo(one_line(f"parity on {parity.pictures} pictures ({parity.source}), batches {batches}:"))
    click.echo(f"  backbone    relative embedding error {parity.relative_embedding_error:.1e}")
    click.echo(f"  head        max score difference     {parity.head_score_difference:.1e}")
    click.echo(f"  end to end  max score difference     {parity.end_to_end_score_difference:.1e}")
    if accuracy:
        click.echo(one_line(f"accuracy on all {accuracy.pairs:,} pairs of {accuracy.source}:"))
        click.echo(f"  ROC AUC {accuracy.roc_auc:.4f}  equal error rate {accuracy.equal_error_rate:.4f}")
        rates = (
            f"{far}: {'too few pairs' if tar is None else f'{tar:.4f}'}" for far, tar in accuracy.tar_at_far.items()
        )
        click.echo(f"  true accept rate at false accept rate  {'  '.join(rates)}")
    manifest = exported.bundle.manifest
    click.echo(one_line(f"threshold: {manifest.threshold:.4f} ({manifest.threshold_origin})"))
    click.echo(f"bundle digest: {exported.bundle.digest}")
    click.echo(one_line(f"bundle: {out_path}"))
