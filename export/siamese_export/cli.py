"""`siamese-export`."""

from __future__ import annotations

from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.errors import needs_extra, one_line


@click.command(cls=Command, name="siamese-export")
@click.option("-c", "--checkpoint", required=True, type=PATH, help="Checkpoint file (.pth), ours or the reference's.")
@click.option("-o", "--out_path", required=True, type=PATH, help="Bundle folder to make; must not exist.")
@click.option("--val_path", type=PATH, help="Pictures to prove parity on; without it, drawn ones.")
def main(checkpoint: Path, out_path: Path, val_path: Path | None) -> None:
    """Export a checkpoint as a bundle of two ONNX graphs, after proving that they answer like PyTorch."""
    with needs_extra("export"):
        import onnxscript  # noqa: F401  torch loads it late; if it is missing, say so before any work

        from siamese_export.export import export_checkpoint
    exported = export_checkpoint(checkpoint, out_path, val_path)
    parity = exported.parity
    click.echo(one_line(f"parity on {parity.pictures} pictures ({parity.source}), batches 1, 2, 3 and 17:"))
    click.echo(f"  backbone    relative embedding error {parity.relative_embedding_error:.1e}")
    click.echo(f"  head        max score difference     {parity.head_score_difference:.1e}")
    click.echo(f"  end to end  max score difference     {parity.end_to_end_score_difference:.1e}")
    click.echo(f"bundle digest: {exported.bundle.digest}")
    click.echo(one_line(f"bundle: {out_path}"))
