"""Did it become slower? Rows against those of an earlier bench.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from siamese_deploy.bench.machine import SAME_MACHINE
from siamese_deploy.bench.run import WORKED, Row
from siamese_deploy.bench.tables import FORMAT
from siamese_deploy.errors import InputDataError, IntegrityError, UsageError
from siamese_deploy.table_files import open_text

_GATED = ("SingleStream", "MultiStream", "Offline")
_MOST_CHARACTERS = 2**26

Key: TypeAlias = tuple[str, str, str, int]
"""Digest of the bundle, provider, scenario, batch."""


@dataclass(frozen=True)
class Baseline:
    path: Path
    machine: dict[str, Any]
    pair_digest: str
    cost_ms: dict[Key, float]
    """Of the rows that can be compared."""


@dataclass(frozen=True)
class Change:
    row: Row
    before_ms: float
    now_ms: float | None
    """None: the row worked in the baseline and does not now."""

    @property
    def more(self) -> float:
        """Part by which it takes longer; below 0: less long."""
        return math.inf if self.now_ms is None else self.now_ms / self.before_ms - 1

    def line(self) -> str:
        row = self.row
        what = f"{row.bundle} {row.provider} {row.scenario} batch {row.batch}"
        if self.now_ms is None:
            return f"{what}: {row.status} now, worked in the baseline ({row.reason})"
        unit = "a group of pictures" if row.scenario == "Offline" else "a query"
        note = ", unstable" if row.status == "unstable" else ""
        return f"{what}: {self.before_ms:.4g} -> {self.now_ms:.4g} ms {unit} ({self.more:+.1%}{note})"


def read_baseline(path: Path) -> Baseline:
    """Raises:
    InputDataError: missing, or no regular file.
    IntegrityError: no bench.json of this format, or damaged.
    EnvironmentFault: no permission to read it.
    """
    expected = "the bench.json of an earlier siamese bench"
    with open_text(path, expected) as file:
        text = file.read(_MOST_CHARACTERS)
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {str(content['format'])[:40]!r}")
        machine = {name: content["machine"][name] for name in SAME_MACHINE}
        return Baseline(path, machine, str(content["workload"]["pair_digest"]), dict(_costs(content["rows"])))
    # Damaged JSON is a ValueError, and so is the median of no windows.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise IntegrityError(f"{path}: damaged, or not {expected} ({FORMAT}): {why}; measure it again") from error


def refuse_other_run(
    baseline: Baseline, machine: dict[str, Any], workload: dict[str, Any], *, any_machine: bool
) -> None:
    """Raises:
    UsageError: the baseline was measured with other pairs, or (unless `any_machine`) elsewhere or with other threads.
    """
    if baseline.pair_digest != workload["pair_digest"]:
        raise UsageError(
            f"{baseline.path}: measured with other pairs of pictures (digest {baseline.pair_digest[:16]} instead of "
            f"{workload['pair_digest'][:16]}); give the same --val_path, --pairs and --seed",
            code="other-pairs",
        )
    differing = [
        f"{name} {baseline.machine[name]} instead of {machine[name]}"
        for name in SAME_MACHINE
        if baseline.machine[name] != machine[name]
    ]
    if differing and not any_machine:
        raise UsageError(
            f"{baseline.path}: measured on another machine ({', '.join(differing)}); measure a baseline here, or "
            "compare all the same with --any_machine"
        )


def compare_with(baseline: Baseline, rows: Sequence[Row]) -> list[Change]:
    """The rows that both have.

    Raises:
        InputDataError: there is none, so that nothing would be checked.
    """
    changes = []
    for row in rows:
        before = baseline.cost_ms.get((row.bundle_digest, row.provider, row.scenario, row.batch))
        if before is not None:
            rate = [(window.p50_ms, window.queries_per_s) for window in row.windows]
            changes.append(Change(row, before, _cost_ms(row.scenario, rate) if row.status in WORKED else None))
        elif row.scenario == "all":  # it does not even start: all of its rows are lost
            key = (row.bundle_digest, row.provider)
            changes += [Change(row, cost, None) for known, cost in baseline.cost_ms.items() if known[:2] == key][:1]
    if not changes:
        raise InputDataError(
            f"{baseline.path}: has no row in common with this run (same bundle digest, provider, scenario and batch); "
            "nothing was compared"
        )
    return changes


def _costs(rows: Any) -> list[tuple[Key, float]]:
    if not isinstance(rows, list):
        raise TypeError("rows: expected a list")
    costs = []
    for row in rows:
        if row["scenario"] not in _GATED or row["status"] not in WORKED:
            continue
        key = (row["bundle_digest"], row["provider"], row["scenario"], row["batch"])
        windows = [(window["p50_ms"], window["queries_per_s"]) for window in row["windows"]]
        for value in (value for window in windows for value in window):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{row['scenario']}: a window says {str(value)[:40]}")
        cost = _cost_ms(row["scenario"], [(float(p50), float(rate)) for p50, rate in windows])
        if not 0 < cost < math.inf:
            raise ValueError(f"{row['scenario']}: takes {cost} ms")
        costs.append((key, cost))
    return costs


def _cost_ms(scenario: str, windows: Sequence[tuple[float, float]]) -> float:
    """Median over the windows, which a burst of noise in one of them leaves alone."""
    return median(1e3 / rate if scenario == "Offline" else p50 for p50, rate in windows)
