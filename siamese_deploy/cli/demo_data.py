"""`siamese demo_data`: something to try the whole chain on."""

from __future__ import annotations

from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.errors import one_line


@click.command(cls=Command, name="demo_data")
@click.argument("out", type=PATH)
@click.option("--train_classes", type=click.IntRange(2, 2000), default=60, help="Characters to learn from.")
@click.option("--val_classes", type=click.IntRange(2, 2000), default=20, help="Characters to validate on.")
@click.option("--drawings", type=click.IntRange(2, 10_000), default=15, help="Drawings of each character.")
@click.option("--seed", type=click.IntRange(0, 40_000), default=1, help="Other numbers give other characters.")
def main(out: Path, train_classes: int, val_classes: int, drawings: int, seed: int) -> None:
    """Draw a data set of made-up characters into the new folder OUT."""
    from siamese_deploy.demo_data import write_demo_data

    write_demo_data(out, train_classes=train_classes, val_classes=val_classes, drawings=drawings, seed=seed)
    click.echo(
        one_line(
            f"drawn: {out}/train ({train_classes} characters), {out}/val ({val_classes}), {drawings} drawings each"
        )
    )
