"""Contenders x scenarios -> rows; a row that fails says why, and the next one is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from siamese_deploy.bench.scenarios import (
    CACHED_PAIRS,
    MULTI_STREAM_PAIRS,
    STAGES,
    Answer,
    BenchVerifier,
    Query,
    Workload,
    cached_pairs,
    identify,
    make_workload,
    multi_stream,
    offline,
    single_stream,
)
from siamese_deploy.bench.timing import Window, measure, percentiles_ms
from siamese_deploy.errors import IntegrityError, SiameseError, one_line
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.pairs import Pairs
from siamese_deploy.providers import usable_cores

Status = Literal["ok", "unstable", "wrong", "failed"]
WORKED: tuple[Status, ...] = ("ok", "unstable")


@dataclass(frozen=True)
class Settings:
    providers: tuple[str, ...] = ("cpu",)
    batches: tuple[int, ...] = ()
    """Pictures in one run of the backbone, for Offline; none: the contender's best batch."""
    gallery_rows: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6)
    min_seconds: float = 2.0
    """For each row, warm-up not counted."""
    min_queries: int = 1
    """For SingleStream and MultiStream."""
    threads: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; figures are absent where `status` is "wrong" or "failed"."""

    bundle: str
    bundle_digest: str
    precision: str
    provider: str
    scenario: str
    """SingleStream, MultiStream, Offline, cached pairs or identify; all: it does not start."""
    batch: int
    """SingleStream, MultiStream: pictures a query; Offline: pictures in one run; cached pairs: pairs a run; identify:
    rows of the gallery."""
    status: Status
    reason: str = ""
    queries: int = 0
    latency_ms: dict[str, float | None] = field(default_factory=dict)
    """Of a query; Offline: from one finished group of pictures to the next."""
    not_computed: dict[str, str] = field(default_factory=dict)
    images_per_s: float | None = None
    pairs_per_s: float | None = None
    """identify: rows a second. Both rates are medians over the windows."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Medians; "total" is that of the whole query."""
    windows: tuple[Window, ...] = ()
    score_difference: float | None = None
    """Largest difference of a score from the evaluation's."""


@dataclass(frozen=True)
class Contender:
    """What is measured: a network by one route. The first four fields name its rows."""

    name: str
    digest: str
    precision: str
    provider: str
    best_batch: int
    tolerance: float
    """Largest difference of a score between a timed run and the evaluation, which runs other batch sizes."""
    open: Callable[[int | None], BenchVerifier]
    """Given the batch of Offline, or None for the other scenarios; what it cannot do is a SiameseError."""
    runs_at_once: int = 1
    """Batches that `embed` takes at a time in Offline."""
    evaluate: Callable[[BenchVerifier, ImageFolder, Pairs], Workload] = make_workload
    """The pairs with the scores that the timed runs must give; the verifier is the opened one."""
    checkpoint: str = ""
    """SHA-256 of the checkpoint that a bundle says it was exported from; "" if it says none."""


@dataclass(frozen=True)
class _Scenario:
    name: str
    batch: int
    images: int
    """Pictures a query."""
    pairs: float
    min_queries: int
    query: Callable[[Executor], Query]
    """Opens and prepares what the queries need; given threads to load pictures in."""


def run_benchmark(
    contenders: Sequence[Contender],
    folder: ImageFolder,
    pairs: Pairs,
    settings: Settings,
    *,
    show_progress: bool = False,
) -> Iterator[Row]:
    """The rows, each as soon as it is finished.

    Raises:
        KeyboardInterrupt: between two queries.
    """
    rows_each = 3 + len(settings.gallery_rows) + (len(settings.batches) or 1)
    with tqdm(total=len(contenders) * rows_each, unit="row", mininterval=0, disable=not show_progress) as progress:
        for contender in contenders:
            finished = 0
            progress.set_description(one_line(f"{contender.name} {contender.provider}"))
            for row in _rows(contender, folder, pairs, settings):
                yield row
                finished += 1
                progress.update()
            progress.update(rows_each - finished)


def _rows(contender: Contender, folder: ImageFolder, pairs: Pairs, settings: Settings) -> Iterator[Row]:
    label = partial(Row, contender.name, contender.digest, contender.precision, contender.provider)
    try:
        verifier = contender.open(None)
        work = contender.evaluate(verifier, folder, pairs)
    except (SiameseError, MemoryError) as error:
        yield label("all", 0, _status(error), _why(error))
        return
    for scenario in _scenarios(contender, verifier, work, settings):
        try:
            # For each row its own threads: what is left to do ends with the row.
            with ThreadPoolExecutor(settings.threads or usable_cores()) as pool:
                row = label(scenario.name, scenario.batch, **_measured(scenario, pool, settings, contender.tolerance))
        except (SiameseError, MemoryError) as error:
            row = label(scenario.name, scenario.batch, _status(error), _why(error))
        yield row


def _scenarios(
    contender: Contender, verifier: BenchVerifier, work: Workload, settings: Settings
) -> Iterator[_Scenario]:
    least, pairs = settings.min_queries, MULTI_STREAM_PAIRS
    yield _Scenario("SingleStream", 2, 2, 1, least, lambda _: single_stream(verifier, work))
    yield _Scenario("MultiStream", 2 * pairs, 2 * pairs, pairs, least, lambda pool: multi_stream(verifier, work, pool))
    for batch in settings.batches or (contender.best_batch,):
        group = batch * contender.runs_at_once

        def batched(pool: Executor, batch: int = batch, group: int = group) -> Query:
            return offline(contender.open(batch), work, pool, group)

        yield _Scenario("Offline", batch, group, group / 2, 1, batched)
    yield _Scenario("cached pairs", CACHED_PAIRS, 0, CACHED_PAIRS, 1, lambda _: cached_pairs(verifier, work))
    for rows in settings.gallery_rows:

        def against(_pool: Executor, rows: int = rows) -> Query:
            return identify(verifier, work, rows)

        yield _Scenario("identify", rows, 0, rows, 1, against)


def _measured(scenario: _Scenario, pool: Executor, settings: Settings, limit: float) -> dict[str, Any]:
    """The fields of its row.

    Raises:
        IntegrityError: a score differs from the evaluation's by more than `limit`.
    """
    worst = 0.0
    stages: list[tuple[int, ...]] = []

    def keep(answer: Answer) -> None:
        nonlocal worst
        if len(answer.scores):
            # NumPy's maximum, unlike Python's, keeps a NaN.
            worst = float(np.maximum(worst, np.abs(answer.scores - answer.expected).max()))
        stages.append(answer.stages_ns)

    timing = measure(scenario.query(pool), keep, min_seconds=settings.min_seconds, min_queries=scenario.min_queries)
    if not worst <= limit:
        raise IntegrityError(
            f"scores differ from the evaluation's by up to {worst:.2g} (at most {limit:g})", code="scores-differ"
        )
    latency, missing = percentiles_ms(timing.durations_ns)
    rate = float(np.median([window.queries_per_s for window in timing.windows]))
    counted = np.array(stages[-len(timing.durations_ns) :])
    medians = dict(zip(STAGES, (np.median(counted, axis=0) / 1e6).tolist(), strict=True)) if counted.size else {}
    return {
        "status": "ok" if timing.stable else "unstable",
        "reason": "" if timing.stable else "the last three windows differ by more than 10 %",
        "queries": len(timing.durations_ns),
        "latency_ms": latency,
        "not_computed": missing,
        "images_per_s": rate * scenario.images or None,
        "pairs_per_s": rate * scenario.pairs,
        "stages_ms": medians | {"total": float(np.median(timing.durations_ns)) / 1e6} if medians else {},
        "windows": timing.windows,
        "score_difference": worst,
    }


def _status(error: BaseException) -> Status:
    return "wrong" if isinstance(error, IntegrityError) else "failed"


def _why(error: BaseException) -> str:
    return one_line(str(error)) or "out of memory"
