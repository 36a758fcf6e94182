"""Two ways in one run, in turns, and a line of a table for each pair of them; shared by the scripts beside it."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each way, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started_s = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started_s)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """As Markdown, to be taken over into README.md."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def print_machine(*packages: str) -> None:
    """Processor, cores, versions of `packages`, commit and date: a table without them is worth nothing."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    print(f"{cpu[1] if cpu else platform.machine()}, {cores} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {metadata.version(name)}" for name in packages))
    print(f"commit {commit}, {time.strftime('%Y-%m-%d')}", flush=True)


class Ratio(NamedTuple):
    what: str
    value: float
    at_least: float | None = None
    """Promised; None where nothing is."""
    at_most: float | None = None

    @property
    def promised(self) -> str:
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{word} {bound:,g}" for word, bound in bounds if bound is not None) or "nothing"

    @property
    def is_kept(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


def print_ratios(title: str, ratios: Sequence[Ratio]) -> None:
    rows = [(what.what, f"{what.value:,.{0 if what.value >= 100 else 2}f}", what.promised) for what in ratios]
    print_table(title, ("what", "ratio", "promised"), rows)


def require_kept(ratios: Sequence[Ratio]) -> None:
    """To be called once everything is printed; exits with 1 where a promise is not kept."""
    broken = [ratio for ratio in ratios if not ratio.is_kept]
    for ratio in broken:
        print(f"NOT KEPT: {ratio.what}: {ratio.value:,.3f}, promised {ratio.promised}", flush=True)
    if broken:
        sys.exit(1)
