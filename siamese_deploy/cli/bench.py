"""`siamese bench`: how fast are these bundles here, on these pictures?"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH, SEED, Command
from siamese_deploy.errors import AccuracyError, EnvironmentFault, IntegrityError, UsageError, one_line
from siamese_deploy.providers import ORT_NAMES

if TYPE_CHECKING:
    from siamese_deploy.bench import Row, Settings
    from siamese_deploy.bench.regression import Baseline
    from siamese_deploy.bundle import Bundle
    from siamese_deploy.image_folder import ImageFolder
    from siamese_deploy.pairs import Pairs

_QUERIES_FOR_P99 = 662


def _percent(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """ "10%" or "10" -> 0.1"""
    if value is None:
        return None
    try:
        number = float(value.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"expected a percentage such as 10%, got {value!r}")
    return number / 100


@click.command(cls=Command, name="bench")
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("-v", "--val_path", required=True, type=PATH, help="Folder of pictures, one sub-folder per class.")
@click.option("-o", "--out_path", type=PATH, help="Folder for bench.json, bench.md and bench.png.")
@click.option("--provider", "providers", type=click.Choice(tuple(ORT_NAMES)), multiple=True, default=("cpu",))
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, help="Offline: pictures in a run.  [default: its best]"
)
@click.option(
    "--gallery_rows",
    type=click.IntRange(1),
    multiple=True,
    default=(10**3, 10**4, 10**5, 10**6),
    help="identify: size of the gallery.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the cores it may use]")
@click.option("--pairs", "n_pairs", type=click.IntRange(1), default=256, help="Pairs to take, at most.")
@click.option("--seed", type=SEED, default=1, help="Draws the pairs.")
@click.option("--min_seconds", type=click.FloatRange(0, 3600), default=2.0, help="Least time for each row.")
@click.option("--queries", type=click.IntRange(1), default=1, help="Least queries for SingleStream and MultiStream.")
@click.option("--full", is_flag=True, help=f"As --queries {_QUERIES_FOR_P99}, which a p99 needs.")
@click.option("--baseline", type=PATH, help="bench.json of an earlier run, to compare with.")
@click.option(
    "--max_regression",
    metavar="PERCENT",
    callback=_percent,
    help="Exit code 11 where a row takes longer by more, such as 10%.",
)
@click.option("--any_machine", is_flag=True, help="Compare with a baseline of another machine.")
def main(
    bundles: tuple[Path, ...],
    val_path: Path,
    out_path: Path | None,
    n_pairs: int,
    seed: int,
    queries: int,
    full: bool,
    baseline: Path | None,
    max_regression: float | None,
    any_machine: bool,
    **settings: Any,
) -> None:
    """Measure latency and throughput of each BUNDLE on real pictures, from the file to the score.

    A row that fails stays in the table with its reason. Exit code 5 means that no row worked, 4 that scores differ from
    the evaluation's, 11 that a row takes longer than in the baseline by more than --max_regression.
    """
    from siamese_deploy.bench import Settings
    from siamese_deploy.bench.machine import describe_machine
    from siamese_deploy.bench.output import output_folder
    from siamese_deploy.bench.regression import read_baseline, refuse_other_run
    from siamese_deploy.bundle import read_bundle
    from siamese_deploy.image_folder import scan_image_folder
    from siamese_deploy.result_folder import refuse_inside

    if baseline is None and (max_regression is not None or any_machine):
        raise UsageError("--max_regression and --any_machine need --baseline")
    if not settings["min_seconds"] >= 0:  # also refuses NaN, which click's own range lets through
        raise UsageError(f"--min_seconds: expected a number from 0 to 3600, got {settings['min_seconds']}")
    if out_path is not None:
        refuse_inside(out_path, val_path)
        if baseline is not None and baseline.resolve() == (out_path / "bench.json").resolve():
            raise UsageError(f"{out_path}: the new bench.json would replace the baseline; choose another folder")
    for name in ("providers", "batches", "gallery_rows"):
        settings[name] = tuple(dict.fromkeys(settings[name]))
    chosen = Settings(min_queries=max(queries, _QUERIES_FOR_P99 if full else 1), **settings)
    earlier = None if baseline is None else read_baseline(baseline)
    opened = [(path.absolute().name, read_bundle(path)) for path in dict.fromkeys(bundles)]
    folder = scan_image_folder(val_path)
    pairs = _some_pairs(folder, n_pairs, seed)
    workload = {"pairs": len(pairs), "seed": seed, "pair_digest": pairs.digest(folder)}
    machine = describe_machine(chosen.threads, with_gpu=chosen.providers != ("cpu",))
    if earlier is not None:
        refuse_other_run(earlier, machine, workload, any_machine=any_machine)
    rows: list[Row] = []
    with ExitStack() as held:
        write = None if out_path is None else held.enter_context(output_folder(out_path))
        try:
            for row in _rows(opened, folder, pairs, chosen):
                rows.append(row)
        except (KeyboardInterrupt, SystemExit):
            _report(rows, chosen, machine, workload, write, complete=False)
            raise
        _report(rows, chosen, machine, workload, write, complete=True)
    _refuse_failure(rows)
    if earlier is not None:
        _gate(earlier, rows, max_regression)


def _rows(opened: list[tuple[str, Bundle]], folder: ImageFolder, pairs: Pairs, settings: Settings) -> Iterator[Row]:
    from siamese_deploy.bench import run_benchmark

    def say(text: str) -> None:
        click.echo(one_line(text), err=True)

    return run_benchmark(opened, folder, pairs, settings, say=say, show_progress=sys.stderr.isatty())


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
        raise IntegrityError(f"{len(wrong)} rows are wrong (first: {wrong[0].bundle} {_of(wrong[0])})")
    if all(row.status == "failed" for row in rows):
        raise EnvironmentFault(f"no row worked (first: {rows[0].bundle} {_of(rows[0])})")


def _some_pairs(folder: ImageFolder, most: int, seed: int) -> Pairs:
    """The seeded pair list of an evaluation, or so many of it, drawn by the same seed and kept in order."""
    import numpy as np

    from siamese_deploy.pairs import sample_pairs

    pairs = sample_pairs(folder, seed)
    order = np.argsort(np.random.RandomState(seed).random_sample(len(pairs)), kind="stable")
    return pairs.take(np.sort(order[:most]))


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
