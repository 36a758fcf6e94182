"""`siamese verify`: do these two pictures show the same thing?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, DecidingCommand
from siamese_deploy.cli.run_log import log
from siamese_deploy.cli.runtime_options import RuntimeOptions, runtime_options, tell_provider, warn_of_cache
from siamese_deploy.errors import UsageError, one_line

NO_MATCH = 10


@click.command(cls=DecidingCommand, name="verify")
@click.argument("left", type=PATH)
@click.argument("right", type=PATH)
@runtime_options
@click.option("--threshold", type=float, help="Accept from this score on, 0 to 1.  [default: the bundle's]")
def main(left: Path, right: Path, runtime: RuntimeOptions, threshold: float | None) -> None:
    """Compare the pictures LEFT and RIGHT.

    Exit code 0 means match, 10 no match, anything else that nothing was decided; so `siamese verify A B -c BUNDLE &&
    open_the_gate` is safe.
    """
    check_threshold(threshold)
    cache = runtime.open_cache()
    verifier = runtime.open_verifier(cache)
    score = verifier.compare(left, right)
    if threshold is None:
        threshold = verifier.threshold
    match = score >= threshold
    tell_provider(verifier)
    warn_of_cache(cache)
    log(
        "decision",
        code="" if match else "below-threshold",
        decision="match" if match else "no match",
        left=str(left),
        right=str(right),
        score=round(score, 4),
        threshold=round(threshold, 4),
    )
    click.echo(one_line(f"{'match' if match else 'no match'}: score {score:.4f}, threshold {threshold:.4f}"))
    if not match:
        sys.exit(NO_MATCH)


def check_threshold(threshold: float | None) -> None:
    if threshold is not None and not 0 <= threshold <= 1:  # also refuses NaN, which click's own range lets through
        raise UsageError(f"--threshold: expected a number from 0 to 1, got {threshold}")
