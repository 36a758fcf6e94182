"""A verifier that runs for months: memory, descriptors and threads stay where they are, whatever is asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REQUESTS = int(os.environ.get("SIAMESE_REQUESTS", "5000"))
RELOADS = int(os.environ.get("SIAMESE_RELOADS", "200"))
FEW = 300
MAX_GROWTH_BYTES = 16 * 2**20
"""Of the resident memory, in the second half of the requests."""

_SOAK = Path(__file__).parents[1] / "soak.py"


def soaked(bundle: Path, folder: Path, requests: int, how: str = "sound") -> dict[str, Any]:
    command = [sys.executable, "-X", "faulthandler", str(_SOAK), str(bundle), str(folder), str(requests), how]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    print(child.stdout)
    report: dict[str, Any] = json.loads(child.stdout)
    return report


def growing(report: dict[str, Any]) -> list[str]:
    half, end = report["half"], report["end"]
    grown = [what for what in ("descriptors", "threads") if end[what] != half[what]]
    return grown + (["memory"] if end["rss_bytes"] - half["rss_bytes"] > MAX_GROWTH_BYTES else [])


def test_nothing_grows(tiny_bundle: Path, tmp_path: Path) -> None:
    report = soaked(tiny_bundle, tmp_path, FEW)
    assert growing(report) == [], report
    assert sum(report["refused"].values()) == FEW // 10


def test_planted_leaks_are_found(tiny_bundle: Path, tmp_path: Path) -> None:
    assert growing(soaked(tiny_bundle, tmp_path, FEW, "leaking")) == ["descriptors", "threads", "memory"]


@pytest.mark.slow
def test_nothing_grows_for_long(tiny_bundle: Path, tmp_path: Path) -> None:
    report = soaked(tiny_bundle, tmp_path, REQUESTS)
    assert growing(report) == [], report
    assert sum(report["refused"].values()) == REQUESTS // 10
    assert len(report["refused"]) == 15, "not every kind of bad input was met"


@pytest.mark.slow
def test_a_bundle_opened_again_and_again(tiny_bundle: Path, tmp_path: Path) -> None:
    report = soaked(tiny_bundle, tmp_path, RELOADS, "reload")
    assert growing(report) == [], report
