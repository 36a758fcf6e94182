"""Bundles x providers x scenarios -> rows; a row that fails says why, and the next one is measured."""

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
from siamese_deploy.bundle import Bundle
from siamese_deploy.errors import IntegrityError, SiameseError, one_line
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.pairs import Pairs
from siamese_deploy.providers import usable_cores
from siamese_deploy.runtime import OnnxVerifier

Status = Literal["ok", "unstable", "wrong", "failed"]
WORKED: tuple[Status, ...] = ("ok", "unstable")


@dataclass(frozen=True)
class Settings:
    providers: tuple[str, ...] = ("cpu",)
    batches: tuple[int, ...] = ()
    """Pictures in one run of the backbone, for Offline; none: the bundle's best batch."""
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
    """SingleStream, MultiStream, Offline, cached pairs or identify; all: the bundle does not start."""
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
class _Scenario:
    name: str
    batch: int
    images: int
    """Pictures a query."""
    pairs: float
    min_queries: int
    query: Callable[[Executor], Query]
    """Opens and prepares what the queries need; given threads to load pictures in."""


Say = Callable[[str], None]


def run_benchmark(
    bundles: Sequence[tuple[str, Bundle]],
    folder: ImageFolder,
    pairs: Pairs,
    settings: Settings,
    *,
    say: Say = lambda _: None,
    show_progress: bool = False,
) -> Iterator[Row]:
    """The rows, each as soon as it is finished.

    Args:
        bundles: names to show, and the bundles.
        say: is told in one line what takes long while TensorRT's engines are built.

    Raises:
        KeyboardInterrupt: between two queries.
    """
    per_provider = 3 + len(settings.gallery_rows) + (len(settings.batches) or 1)
    total = len(bundles) * len(settings.providers) * per_provider
    with tqdm(total=total, unit="row", mininterval=0, disable=not show_progress) as progress:
        for name, bundle in bundles:
            for provider in settings.providers:
                finished = 0
                label = partial(Row, name, bundle.digest, bundle.manifest.precision, provider)
                progress.set_description(one_line(f"{name} {provider}"))
                for row in _rows(label, bundle, provider, folder, pairs, settings, say):
                    yield row
                    finished += 1
                    progress.update()
                progress.update(per_provider - finished)


def _rows(
    label: Callable[..., Row],
    bundle: Bundle,
    provider: str,
    folder: ImageFolder,
    pairs: Pairs,
    settings: Settings,
    say: Say,
) -> Iterator[Row]:
    open_verifier = partial(OnnxVerifier, bundle, provider=provider, threads=settings.threads, say=say)
    try:
        verifier = open_verifier()
        work = make_workload(verifier, folder, pairs)
    except (SiameseError, MemoryError) as error:
        yield label("all", 0, _status(error), _why(error))
        return
    threads = settings.threads or usable_cores()
    limit = tolerance(bundle, provider)
    for scenario in _scenarios(open_verifier, verifier, work, threads, settings):
        try:
            with ThreadPoolExecutor(threads) as pool:  # for each row its own: what is left to do ends with the row
                row = label(scenario.name, scenario.batch, **_measured(scenario, pool, settings, limit))
        except (SiameseError, MemoryError) as error:
            row = label(scenario.name, scenario.batch, _status(error), _why(error))
        yield row


def _scenarios(
    open_verifier: Callable[..., OnnxVerifier],
    verifier: OnnxVerifier,
    work: Workload,
    threads: int,
    settings: Settings,
) -> Iterator[_Scenario]:
    least, pairs = settings.min_queries, MULTI_STREAM_PAIRS
    yield _Scenario("SingleStream", 2, 2, 1, least, lambda _: single_stream(verifier, work))
    yield _Scenario("MultiStream", 2 * pairs, 2 * pairs, pairs, least, lambda pool: multi_stream(verifier, work, pool))
    runs_at_once = threads if verifier.provider == "cpu" else 1
    for batch in settings.batches or (verifier.bundle.manifest.batch[1],):
        group = batch * runs_at_once

        def batched(pool: Executor, batch: int = batch, group: int = group) -> Query:
            return offline(open_verifier(throughput=True, max_batch=batch), work, pool, group)

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
        raise IntegrityError(f"scores differ from the evaluation's by up to {worst:.2g} (at most {limit:g})")
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


def tolerance(bundle: Bundle, provider: str) -> float:
    """Largest difference of a score between a timed run and the evaluation, which runs other batch sizes."""
    # Elsewhere another batch size may mean another kernel, and in 8 and 16 bits rounding that falls to the other side.
    return 1e-6 if (provider, bundle.manifest.precision) == ("cpu", "fp32") else 1e-2


def _status(error: BaseException) -> Status:
    return "wrong" if isinstance(error, IntegrityError) else "failed"


def _why(error: BaseException) -> str:
    return one_line(str(error)) or "out of memory"
