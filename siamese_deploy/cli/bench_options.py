"""Options that siamese bench and siamese-train-bench share: which pictures, which rows, how long, and the gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH, SEED
from siamese_deploy.cli.runtime_options import VERIFY_KEY
from siamese_deploy.errors import UsageError
from siamese_deploy.providers import ORT_NAMES

if TYPE_CHECKING:
    from siamese_deploy.bench import Settings
    from siamese_deploy.image_folder import ImageFolder
    from siamese_deploy.pairs import Pairs

_QUERIES_FOR_P99 = 662


@dataclass(frozen=True)
class BenchOptions:
    val_path: Path
    out_path: Path | None
    providers: tuple[str, ...]
    batches: tuple[int, ...]
    gallery_rows: tuple[int, ...]
    threads: int | None
    n_pairs: int
    seed: int
    min_seconds: float
    queries: int
    full: bool
    baseline: Path | None
    max_regression: float | None
    any_machine: bool
    expect_digests: tuple[str, ...]
    verify_key: Path | None

    def check(self) -> None:
        """
        Raises:
            UsageError: options that exclude each other or have no effect, or an output that would destroy an input.
        """
        from siamese_deploy.result_folder import refuse_inside

        if self.baseline is None and (self.max_regression is not None or self.any_machine):
            raise UsageError("--max_regression and --any_machine need --baseline")
        if not self.min_seconds >= 0:  # also refuses NaN, which click's own range lets through
            raise UsageError(f"--min_seconds: expected a number from 0 to 3600, got {self.min_seconds}")
        if self.out_path is not None:
            refuse_inside(self.out_path, self.val_path)
            if self.baseline is not None and self.baseline.resolve() == (self.out_path / "bench.json").resolve():
                raise UsageError(
                    f"{self.out_path}: the new bench.json would replace the baseline; choose another folder"
                )

    def settings(self) -> Settings:
        """What is asked for twice is measured once."""
        from siamese_deploy.bench import Settings

        return Settings(
            providers=tuple(dict.fromkeys(self.providers)),
            batches=tuple(dict.fromkeys(self.batches)),
            gallery_rows=tuple(dict.fromkeys(self.gallery_rows)),
            min_seconds=self.min_seconds,
            min_queries=max(self.queries, _QUERIES_FOR_P99 if self.full else 1),
            threads=self.threads,
        )

    def choose_pairs(self) -> tuple[ImageFolder, Pairs]:
        """The folder, and the seeded pair list of an evaluation, or so many of it, drawn by the same seed and in order.

        Raises:
            InputDataError: no folder of classes, or too few of them.
        """
        import numpy as np

        from siamese_deploy.image_folder import scan_image_folder
        from siamese_deploy.pairs import sample_pairs

        folder = scan_image_folder(self.val_path)
        pairs = sample_pairs(folder, self.seed)
        order = np.argsort(np.random.RandomState(self.seed).random_sample(len(pairs)), kind="stable")
        return folder, pairs.take(np.sort(order[: self.n_pairs]))


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


_OPTIONS = (
    click.option("-v", "--val_path", required=True, type=PATH, help="Folder of pictures, one sub-folder per class."),
    click.option("-o", "--out_path", type=PATH, help="Folder for bench.json, bench.md and bench.png."),
    click.option("--provider", "providers", type=click.Choice(tuple(ORT_NAMES)), multiple=True, default=("cpu",)),
    click.option(
        "--batch",
        "batches",
        type=click.IntRange(1),
        multiple=True,
        help="Offline: pictures in a run.  [default: its best]",
    ),
    click.option(
        "--gallery_rows",
        type=click.IntRange(1),
        multiple=True,
        default=(10**3, 10**4, 10**5, 10**6),
        help="identify: size of the gallery.",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the cores it may use]"),
    click.option("--pairs", "n_pairs", type=click.IntRange(1), default=256, help="Pairs to take, at most."),
    click.option("--seed", type=SEED, default=1, help="Draws the pairs."),
    click.option("--min_seconds", type=click.FloatRange(0, 3600), default=2.0, help="Least time for each row."),
    click.option(
        "--queries", type=click.IntRange(1), default=1, help="Least queries for SingleStream and MultiStream."
    ),
    click.option("--full", is_flag=True, help=f"As --queries {_QUERIES_FOR_P99}, which a p99 needs."),
    click.option("--baseline", type=PATH, help="bench.json of an earlier run, to compare with."),
    click.option(
        "--max_regression",
        metavar="PERCENT",
        callback=_percent,
        help="Exit code 11 where a row takes longer by more, such as 10%.",
    ),
    click.option("--any_machine", is_flag=True, help="Compare with a baseline of another machine."),
    click.option(
        "--expect_digest",
        "expect_digests",
        metavar="HEX",
        multiple=True,
        help="Refuse any other bundle than the one with this manifest_sha256; once for each bundle, in their order.",
    ),
    VERIFY_KEY,
)


def bench_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets them as the keyword `options`."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        names = BenchOptions.__dataclass_fields__
        options = BenchOptions(**{name: given.pop(name) for name in names})
        options.check()
        command(options=options, **given)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options
