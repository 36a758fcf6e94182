"""Does `siamese bench --max_regression 10%` see a slowdown of 20 %, and only that?

    python gate.py

One baseline; then in turns a run with nothing changed, which has to end with 0, and one in which every query takes a
fifth longer, which has to end with 11. The slowdown is real: after each query the process waits, busy, for 20 % of what
the query took, inside of the timed part. Resnet18 with random weights; each run is a process of its own. It wants the
machine for itself: what else runs is a slowdown, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from measuring import print_machine, print_table
from runtime import make_bundle

SLOWER = 1.2
LIMIT = "10%"
UNCHANGED, SLOWED = 0, 11
"""Exit codes."""


@click.group(invoke_without_command=True)
@click.option("--attempts", type=click.IntRange(1), default=5, show_default=True, help="Of each kind.")
@click.option("--min_seconds", default=2.0, show_default=True, help="As of siamese bench.")
@click.pass_context
def main(context: click.Context, attempts: int, min_seconds: float) -> None:
    if context.invoked_subcommand is not None:
        return
    print_machine("onnxruntime", "numpy", "pillow")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/xdg"
        options = [make_bundle(folder), "-v", folder / "pictures/val", "--min_seconds", min_seconds]
        options += ["--pairs", 32, "--gallery_rows", 1000]
        bench(False, options, "-o", folder / "baseline")
        gate = ["--baseline", folder / "baseline/bench.json", "--max_regression", LIMIT]
        rows, right = [], {UNCHANGED: 0, SLOWED: 0}
        for attempt in range(1, attempts + 1):
            for expected in (UNCHANGED, SLOWED):
                done = bench(expected == SLOWED, options, *gate)
                changes = [line for line in done.stdout.splitlines() if line.startswith("baseline:")]
                shown = ", ".join(line.rpartition("(")[2].rstrip(")") for line in changes)
                kind = "20 % slower" if expected == SLOWED else "unchanged"
                rows.append((attempt, kind, shown, done.returncode, expected))
                right[expected] += done.returncode == expected
    header = ("attempt", "what", "SingleStream, MultiStream, Offline", "exit code", "expected")
    print_table(f"Gate of {LIMIT}", header, rows)
    print(f"unchanged passes: {right[UNCHANGED]} of {attempts}; slower is refused: {right[SLOWED]} of {attempts}")
    assert right == {UNCHANGED: attempts, SLOWED: attempts}, right


def bench(slow: bool, *options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "child", *(["--slow"] if slow else []), "--"]
    for option in options:
        command += map(str, option if isinstance(option, list) else [option])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (UNCHANGED, SLOWED), done.stderr
    return done


@main.command(hidden=True)
@click.option("--slow", is_flag=True)
@click.argument("arguments", nargs=-1)
def child(slow: bool, arguments: tuple[str, ...]) -> None:
    """`siamese bench` with these arguments."""
    from siamese_deploy.bench import run
    from siamese_deploy.cli import main as siamese

    if slow:
        measure = run.measure

        def measure_slowed(query: Callable[[int], Any], *more: Any, **options: Any) -> Any:
            return measure(slowed(query), *more, **options)

        run.measure = measure_slowed  # type: ignore[assignment]
    siamese(["bench", *arguments])


def slowed(query: Callable[[int], Any]) -> Callable[[int], Any]:
    def slow_query(number: int) -> Any:
        started_ns = time.perf_counter_ns()
        answer = query(number)
        end_ns = started_ns + SLOWER * (time.perf_counter_ns() - started_ns)
        while time.perf_counter_ns() < end_ns:
            pass
        return answer

    return slow_query


if __name__ == "__main__":
    main()
