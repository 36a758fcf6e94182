"""`siamese bench`: how fast are these bundles here, on these pictures?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.bench_options import BenchOptions, bench_options
from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.run_log import log_at_end, warn
from siamese_deploy.errors import AccuracyError, EnvironmentFault, IntegrityError, UsageError, one_line

if TYPE_CHECKING:
    from siamese_deploy.bench import Contender, Row, Settings
    from siamese_deploy.bench.regression import Baseline


@click.command(cls=Command, name="bench")
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@bench_options
def main(bundles: tuple[Path, ...], options: BenchOptions) -> None:
    """Measure latency and throughput of each BUNDLE on real pictures, from the file to the score.

    A row that fails stays in the table with its reason. Exit code 5 means that no row worked, 4 that scores differ from
    the evaluation's, 11 that a row takes longer than in the baseline by more than --max_regression.
    """
    bench_into(lambda settings: open_bundles(bundles, options, settings), options)


def open_bundles(paths: Sequence[Path], options: BenchOptions, settings: Settings) -> list[Contender]:
    """The bundles, each once, on each provider.

    Raises:
        InputDataError: no such bundle.
        BundleError: not a bundle, damaged, or another one than expected.
        UsageError: not as many digests as bundles.
    """
    from siamese_deploy.bench import bundle_contenders
    from siamese_deploy.bundle import read_bundle

    if options.expect_digests and len(options.expect_digests) != len(paths):
        raise UsageError(
            f"--expect_digest: expected one for each of {len(paths)} bundles, got {len(options.expect_digests)}"
        )
    expected = options.expect_digests or (None,) * len(paths)

    def say(text: str) -> None:
        warn("engine-cache", text)

    read = {
        path: read_bundle(path, expect_digest=digest, verify_key=options.verify_key)
        for path, digest in zip(paths, expected, strict=True)
    }
    opened = [(path.absolute().name, bundle) for path, bundle in read.items()]
    return [one for name, bundle in opened for one in bundle_contenders(name, bundle, settings, say=say)]


def bench_into(
    open_contenders: Callable[[Settings], list[Contender]], options: BenchOptions, *, libraries: Sequence[str] = ()
) -> None:
    """Measure, print the table, write it into the output folder and gate; shared with siamese-train-bench.

    Args:
        libraries: as of `describe_machine`.
    """
    from siamese_deploy.bench import run_benchmark
    from siamese_deploy.bench.machine import describe_machine
    from siamese_deploy.bench.output import output_folder
    from siamese_deploy.bench.regression import read_baseline, refuse_other_run

    settings = options.settings()
    earlier = None if options.baseline is None else read_baseline(options.baseline)
    contenders = open_contenders(settings)
    folder, pairs = options.choose_pairs()
    workload = {"pairs": len(pairs), "seed": options.seed, "pair_digest": pairs.digest(folder)}
    machine = describe_machine(settings.threads, with_gpu=settings.providers != ("cpu",), libraries=libraries)
    if earlier is not None:
        refuse_other_run(earlier, machine, workload, any_machine=options.any_machine)
    rows: list[Row] = []
    with ExitStack() as held:
        write = None if options.out_path is None else held.enter_context(output_folder(options.out_path))
        try:
            for row in run_benchmark(contenders, folder, pairs, settings, show_progress=sys.stderr.isatty()):
                rows.append(row)
        except (KeyboardInterrupt, SystemExit):
            _report(rows, settings, machine, workload, write, complete=False)
            raise
        _report(rows, settings, machine, workload, write, complete=True)
    _refuse_failure(rows)
    if earlier is not None:
        _gate(earlier, rows, options.max_regression)


def _report(
    rows: list[Row],
    settings: Settings,
    machine: dict[str, Any],
    workload: dict[str, Any],
    write: Callable[[Mapping[str, bytes]], None] | None,
    *,
    complete: bool,
) -> None:
    """Into the output folder, if there is one, and onto the terminal."""
    log_at_end(rows=len(rows), rows_failed=sum(row.status in ("failed", "wrong") for row in rows))
    from siamese_deploy.bench.chart import chart_png
    from siamese_deploy.bench.tables import bench_content, bench_json, markdown, table_lines

    if write is not None:
        content = bench_content(rows, settings, machine, workload, complete=complete)
        text = markdown(rows, machine, complete=complete)
        write({"bench.json": bench_json(content), "bench.md": text.encode("utf-8"), "bench.png": chart_png(rows)})
    for line in table_lines(rows) if rows else []:
        click.echo(line)


def _refuse_failure(rows: list[Row]) -> None:
    """Raises:
    IntegrityError: a row gave wrong scores.
    EnvironmentFault: no row worked.
    """
    wrong = [row for row in rows if row.status == "wrong"]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} rows are wrong (first: {wrong[0].bundle} {_of(wrong[0])})", code="scores-differ"
        )
    if all(row.status == "failed" for row in rows):
        raise EnvironmentFault(f"no row worked (first: {rows[0].bundle} {_of(rows[0])})")


def _of(row: Row) -> str:
    return f"{row.provider} {row.scenario}: {row.reason}"


def _gate(baseline: Baseline, rows: list[Row], limit: float | None) -> None:
    """Raises:
    AccuracyError: a row takes longer by more than `limit`.
    """
    from siamese_deploy.bench.regression import compare_with

    changes = compare_with(baseline, rows)
    for change in changes:
        click.echo(one_line(f"baseline: {change.line()}"))
    worse = [change for change in changes if limit is not None and change.more > limit]
    if limit is not None and worse:
        worst = max(worse, key=lambda change: change.more)
        raise AccuracyError(f"{len(worse)} of {len(changes)} rows are slower by more than {limit:.0%} ({worst.line()})")
