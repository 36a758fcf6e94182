"""Rows -> the table for people, bench.json and bench.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from siamese_deploy.bench.run import WORKED, Row, Settings
from siamese_deploy.bench.scenarios import STAGES
from siamese_deploy.errors import one_line

FORMAT = "siamese-bench/1"
_TITLES = (
    "bundle", "precision", "provider", "scenario", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s", "pairs/s",
    "queries", "note",
)  # fmt: skip
_LEFT = (0, 1, 2, 3, 11)
_DASH = "-"


def bench_content(
    rows: Sequence[Row],
    settings: Settings,
    machine: dict[str, Any],
    workload: dict[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """What bench.json holds; docs/bench.md describes it."""
    return {
        "format": FORMAT,
        "complete": complete,
        "machine": machine,
        "workload": workload,
        "settings": asdict(settings),
        "rows": [_rounded(asdict(row)) for row in rows],
    }


def bench_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("ascii")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal, then the medians of the stages."""
    lines = _aligned([_TITLES, *(_cells(row) for row in rows)], _LEFT)
    staged = [row for row in rows if row.stages_ms]
    if staged:
        titles = ("median ms a pair", "provider", *STAGES, "total")
        lines += ["", *_aligned([titles, *(_stage_cells(row) for row in staged)], (0, 1))]
    return lines


def markdown(rows: Sequence[Row], machine: dict[str, Any], *, complete: bool) -> str:
    parts = ["# siamese bench", ""]
    if not complete:
        parts += ["**Incomplete: the run was interrupted.**", ""]
    parts += _markdown_table([_TITLES, *(_cells(row) for row in rows)])
    staged = [row for row in rows if row.stages_ms]
    if staged:
        titles = ("SingleStream, median ms", "provider", *STAGES, "total")
        parts += ["", *_markdown_table([titles, *(_stage_cells(row) for row in staged)])]
    facts = {**machine, **machine["versions"]}
    del facts["versions"]
    parts += ["", *_markdown_table([("machine", ""), *((name, _shown(fact)) for name, fact in facts.items())]), ""]
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    notes = [row.reason] if row.status in WORKED else [f"{row.status}: {row.reason}"]
    if row.status == "unstable":
        notes = [f"unstable: {row.reason}"]
    notes += [f"{name}: {reason}" for name, reason in row.not_computed.items()]
    return (
        row.bundle,
        row.precision,
        row.provider,
        row.scenario,
        f"{row.batch:,}" if row.batch else _DASH,
        *(_number(row.latency_ms.get(name)) for name in ("p50", "p90", "p99")),
        _number(row.images_per_s),
        _number(row.pairs_per_s),
        f"{row.queries:,}" if row.queries else _DASH,
        "; ".join(filter(None, notes)),
    )


def _stage_cells(row: Row) -> tuple[str, ...]:
    return (row.bundle, row.provider, *(_number(row.stages_ms[name]) for name in (*STAGES, "total")))


def _number(value: float | None) -> str:
    """Three digits or all before the point; more is noise."""
    if value is None:
        return _DASH
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.{1 if value >= 10 else 2}f}"


def _shown(fact: object) -> str:
    return _DASH if fact is None else str(fact)


def _aligned(table: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    table = [[one_line(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in table]
    return [lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]


def _markdown_cell(text: str) -> str:
    """The text itself, whatever a folder is called: no column, link, emphasis or HTML of its own."""
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#&~" else c for c in one_line(text))


def _rounded(value: Any) -> Any:
    """Floats with 6 digits, also inside."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
