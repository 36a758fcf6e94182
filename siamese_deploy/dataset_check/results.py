"""A DatasetReport as JSON, as CSV and as text for a terminal, and the folder that holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from siamese_deploy.dataset_check.check import DatasetReport
from siamese_deploy.dataset_check.findings import KINDS, Finding
from siamese_deploy.durable_files import locked_folder, write_atomically
from siamese_deploy.errors import UsageError, one_line
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.table_files import csv_bytes, harmless

FORMAT = "siamese-check/1"
FILES = ("findings.csv", "contact_sheet.png", "findings.json")
MARKER = ".siamese-check"
"""In a folder that has it, FILES are of an earlier check and may be replaced."""
_EXAMPLES = 3
_EQUAL = ("leakage", "label-conflict", "duplicate")
_PATHS_SHOWN = 4


def report_json(report: DatasetReport, *, strict: bool, near: int) -> dict[str, Any]:
    """The object that docs/check.md describes. Paths that are not UTF-8 hold lone surrogates, which `json.dumps`
    escapes and `os.fsencode` turns back into the bytes on the disk."""
    codes = {code: sum(finding.code == code for finding in report.findings) for code in KINDS}
    return {
        "format": FORMAT,
        "exit_code": report.exit_code(strict=strict),
        "strict": strict,
        "folders": [checked.summary() for checked in report.folders],
        "counts": {severity: report.count(severity) for severity in ("error", "warning", "note")},
        "codes": {code: count for code, count in codes.items() if count},
        "near_duplicates": {
            "run": report.near is not None,
            "distance": near,
            "compared": report.near.compared if report.near else 0,
            "pairs": report.near.pairs if report.near else None,
        },
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "message": finding.message,
                "paths": list(finding.paths),
            }
            for finding in report.findings
        ],
    }


def json_text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2) + "\n"


def findings_csv(report: DatasetReport) -> bytes:
    """Columns finding, severity, code, path, message: a row for each path of a finding, which share its number.

    A path that a spreadsheet would take for a formula has "./" before it; names that are not UTF-8 come out as the
    bytes they are on the disk.
    """
    rows: list[tuple[object, ...]] = [("finding", "severity", "code", "path", "message")]
    for number, finding in enumerate(report.findings, start=1):
        for path in finding.paths or ("",):
            rows.append((number, finding.severity, finding.code, harmless(path), finding.message))
    return csv_bytes(rows)


def report_lines(report: DatasetReport, *, strict: bool) -> Iterator[str]:
    """The report for a terminal: names are escaped, a few examples of each kind are given."""
    for checked in report.folders:
        facts = checked.summary()
        yield one_line(
            f"{facts['path']}: {facts['usable']:,} of {facts['pictures']:,} pictures usable, {facts['classes']:,} "
            f"classes of {facts['smallest_class']:,} to {facts['largest_class']:,}"
        )
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        findings, kind = list(group), KINDS[code]
        yield f"{kind.severity:<8} {code} ({len(findings):,}): {kind.title}; {kind.advice}"
        for finding in findings[:_EXAMPLES]:
            yield one_line(f"           {_example(finding)}")
        if len(findings) > _EXAMPLES:
            yield f"           ... and {len(findings) - _EXAMPLES:,} more"
    yield f"verdict: {_verdict(report, strict)}"


def _example(finding: Finding) -> str:
    between = " = " if finding.code in _EQUAL else ", "
    shown = between.join(finding.paths[:_PATHS_SHOWN])
    if len(finding.paths) > _PATHS_SHOWN:
        shown += f"{between}... ({len(finding.paths):,} in all)"
    return f"{shown}: {finding.message}" if shown else finding.message


def _verdict(report: DatasetReport, strict: bool) -> str:
    counts = [(report.count(severity), severity) for severity in ("error", "warning", "note")]
    found = ", ".join(f"{count:,} {severity}{'s' * (count != 1)}" for count, severity in counts if count)
    if not found:
        return "nothing found"
    return f"{found}; {'to be repaired' if report.exit_code(strict=strict) else 'nothing that stops training'}"


@contextmanager
def check_folder(out_path: Path) -> Iterator[None]:
    """Hold the folder that results will be written into (made if missing).

    Raises:
        UsageError: `out_path` is a file, or holds files named like FILES that no check wrote.
        BusyError: another run writes into it.
    """
    with locked_folder(out_path):
        foreign = [name for name in FILES if (out_path / name).exists()]
        if foreign and not (out_path / MARKER).exists():
            raise UsageError(
                f"{out_path}: holds {', '.join(foreign)} that this program did not write there; choose another folder",
                code="output-exists",
            )
        yield


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def write_results(out_path: Path, report: DatasetReport, facts: dict[str, Any], contact_sheet: bytes) -> None:
    """Replace FILES in a held folder. findings.json is removed first and written last: it stands for the whole."""
    contents = (findings_csv(report), contact_sheet, json_text(facts).encode("ascii"))
    with interrupts_held():
        (out_path / MARKER).touch()
        (out_path / "findings.json").unlink(missing_ok=True)
        for name, data in zip(FILES, contents, strict=True):
            write_atomically(out_path / name, partial(_write, data))
