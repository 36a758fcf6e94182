"""`siamese prepare`: TensorRT builds for minutes; have it do so now, and not when the first picture waits."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.run_log import warn
from siamese_deploy.cli.runtime_options import EXPECT_DIGEST, VERIFY_KEY
from siamese_deploy.errors import EnvironmentFault, one_line
from siamese_deploy.providers import ORT_NAMES

_TICK_S = 0.2


@click.command(cls=Command, name="prepare")
@click.argument("bundle", type=PATH)
@click.option(
    "--provider",
    type=click.Choice(tuple(ORT_NAMES)),
    default="tensorrt",
    help="What to prepare for. cpu and cuda keep nothing: it is only checked that the bundle starts.",
)
@click.option(
    "--max_batch",
    type=click.IntRange(min=1),
    help="Most pictures in one run: the number that later starts will ask for.  [default: the bundle's]",
)
@EXPECT_DIGEST
@VERIFY_KEY
def main(
    bundle: Path, provider: str, max_batch: int | None, expect_digest: str | None, verify_key: Path | None
) -> None:
    """Build and keep the TensorRT engines of BUNDLE for this machine, as the user who will run it."""
    from siamese_deploy.engine_cache import default_engine_root, published_engines

    start = time.monotonic()
    accepted = {"expect_digest": expect_digest, "verify_key": verify_key}
    if provider != "tensorrt":
        _open_in_child(bundle, provider, max_batch, accepted)
        click.echo(f"{provider}: nothing to prepare; the bundle starts here ({time.monotonic() - start:.1f} s)")
        return
    root = default_engine_root()
    if root is None:
        raise EnvironmentFault(
            "no home folder to keep engines in; set XDG_CACHE_HOME to a folder of this user", code="no-home"
        )
    before = published_engines(root)
    _open_in_child(bundle, provider, max_batch, accepted)
    after = published_engines(root)
    built = sum(after[name][0] != before.get(name, (0, 0))[0] for name in after)
    opened = sum(after[name][1] != before.get(name, (0, 0))[1] for name in after)
    if not opened:
        raise EnvironmentFault(f"{root}: the bundle starts, but no engine was kept; every start will build it again")
    click.echo(
        one_line(
            f"tensorrt: engines built: {built}, there already: {opened - built}; {time.monotonic() - start:.1f} s; "
            f"in {root}"
        )
    )


def _open_in_child(bundle: Path, provider: str, max_batch: int | None, accepted: dict[str, Any]) -> None:
    """Open the bundle once, in a process of its own, with a clock where somebody watches; `accepted`: of read_bundle.

    ONNX Runtime up to 1.23 at least keeps Python's global lock while it opens a session: in this process neither the
    clock nor Ctrl-C would work for minutes. And where memory runs out, the kernel ends a child.
    """
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_open, args=(theirs, bundle, provider, max_batch, accepted), daemon=True)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the parent, which ends it
    child.start()
    signal.signal(signal.SIGINT, on_interrupt)
    theirs.close()
    try:
        while True:
            _on_terminal(f"opening on {provider}: {time.monotonic() - start:.0f} s")
            if not ours.poll(_TICK_S):
                continue
            message = ours.recv()
            _on_terminal("")
            if not isinstance(message, str):
                break
            warn("engine-cache", message)
    except EOFError as error:
        child.join()
        raise EnvironmentFault(
            f"{bundle}: the process that opened it on {provider} ended by itself (exit code {child.exitcode}; -9 "
            "means out of memory); free memory or lower --max_batch",
            code="process-died",
        ) from error
    finally:
        child.kill()  # a half-built engine is not believed
        child.join()
        ours.close()
    if message is not None:
        raise message


def _on_terminal(text: str) -> None:
    """Replace the last line of stderr, if somebody sees it."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", nl=False, err=True)


def _open(pipe: Connection, bundle: Path, provider: str, max_batch: int | None, accepted: dict[str, Any]) -> None:
    """Sends lines for the user, and at the end None or the error."""
    try:
        from siamese_deploy.bundle import read_bundle
        from siamese_deploy.runtime import OnnxVerifier

        verifier = OnnxVerifier(read_bundle(bundle, **accepted), provider=provider, max_batch=max_batch, say=pipe.send)
        if verifier.provider_note:
            pipe.send(verifier.provider_note)
    except Exception as error:
        pipe.send(error)
    else:
        pipe.send(None)
