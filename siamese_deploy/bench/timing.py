"""One query, again and again: what is not counted, when to stop, and which figures so many queries allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from siamese_deploy.interrupts import interrupts_held

QUERIES_NEEDED = {50: 1, 90: 64, 99: 662}
"""By percentile; for 90 and 99 MLPerf Inference's early stopping rule at 99 % confidence."""
STABLE_WITHIN = 0.10
WINDOWS_COMPARED = 3
MOST_WINDOWS = 10
"""A row that has not become stable by then is reported as it is."""
_WARM_UP_QUERIES = 2
_WARM_UP_PART = 0.25

Nanoseconds = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """Consecutive queries that took at least a third of the minimum duration."""

    p50_ms: float
    queries_per_s: float


@dataclass(frozen=True)
class Timing:
    durations_ns: Nanoseconds
    """(n_queries,) without the warm-up."""
    windows: tuple[Window, ...]

    @property
    def stable(self) -> bool:
        return is_stable(self.windows)


def measure(
    query: Callable[[int], T], keep: Callable[[T], object], *, min_seconds: float, min_queries: int = 1
) -> Timing:
    """Time `query(0)`, `query(1)`, ... one after the other; the first of them, the warm-up, are not counted.

    It ends when `min_seconds` and `min_queries` are reached and the last windows agree, or are MOST_WINDOWS.

    Args:
        keep: is given each answer, those of the warm-up too, outside of the timed part.

    Raises:
        KeyboardInterrupt: between two queries.
    """
    number = 0
    with interrupts_held() as let_interrupts_through:

        def timed() -> int:
            nonlocal number
            start = time.perf_counter_ns()
            answer = query(number)
            took = time.perf_counter_ns() - start
            keep(answer)
            number += 1
            let_interrupts_through()
            return took

        warm_up_ns = 0
        while number < _WARM_UP_QUERIES or warm_up_ns < _WARM_UP_PART * min_seconds * 1e9:
            warm_up_ns += timed()
        durations: list[int] = []
        windows: list[Window] = []
        while True:
            current: list[int] = []
            window_ns = 0
            while window_ns * WINDOWS_COMPARED < min_seconds * 1e9 or not current:
                current.append(timed())
                window_ns += current[-1]
            durations += current
            windows.append(Window(float(np.median(current)) / 1e6, len(current) * 1e9 / max(window_ns, 1)))
            enough = len(windows) >= WINDOWS_COMPARED and len(durations) >= min_queries
            if enough and (is_stable(windows) or len(windows) >= MOST_WINDOWS):
                return Timing(np.array(durations, np.int64), tuple(windows))


def is_stable(windows: Sequence[Window]) -> bool:
    """Whether latency and throughput of the last WINDOWS_COMPARED windows lie within STABLE_WITHIN."""
    last = windows[-WINDOWS_COMPARED:]
    latency, rate = [window.p50_ms for window in last], [window.queries_per_s for window in last]
    return len(last) == WINDOWS_COMPARED and all(
        max(values) <= (1 + STABLE_WITHIN) * min(values) for values in (latency, rate)
    )


def percentiles_ms(durations_ns: Nanoseconds) -> tuple[dict[str, float | None], dict[str, str]]:
    """{"p50", "p90", "p99"} in ms, None where there were too few queries; and for those the reason.

    A percentile is a latency that occurred: the smallest one that so many per cent of the queries did not exceed.
    """
    values: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    ordered, n = np.sort(durations_ns), len(durations_ns)
    for percent, needed in QUERIES_NEEDED.items():
        name = f"p{percent}"
        if n < needed:
            values[name], missing[name] = None, f"too few queries ({n} of {needed})"
        else:
            values[name] = float(ordered[-(-percent * n // 100) - 1]) / 1e6
    return values, missing
