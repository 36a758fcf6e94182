"""Two ways in one run, in turns, and a line of a table for each pair of them; shared by the scripts beside it."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path


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
