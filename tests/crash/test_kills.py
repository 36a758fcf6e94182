"""Writers killed by SIGKILL: what they acknowledged is there, and nothing is half there.

SIAMESE_KILLS is the number over all protocols. A kill says nothing of power cuts, as the kernel keeps the pages.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crash.kills import Lost, Report, kill_writers
from crash.protocols import PROTOCOLS
from crash.worker import Worker

KILLS = int(os.environ.get("SIAMESE_KILLS", "100"))
ROWS, MANY_ROWS = 24, 150
"""Of a step."""


def _kill_all(worker: Worker, folder: Path, names: list[str], kills: int, rows: int) -> Report:
    whole = Report()
    for turn, name in enumerate(names):
        share = kills // len(names) + (turn < kills % len(names))
        report = kill_writers(worker, folder, name, share, rows=rows)
        print(f"{name}: {report}")
        for field in vars(whole):
            setattr(whole, field, getattr(whole, field) + getattr(report, field))
    print(f"all: {whole}")
    assert whole.kills == kills
    assert whole.in_step >= kills / 2
    return whole


def test_killed_writers(worker: Worker, tmp_path: Path) -> None:
    _kill_all(worker, tmp_path, ["atomic file", "replaced bundle", "gallery"], 9, ROWS)


@pytest.mark.slow
def test_many_killed_writers(worker: Worker, tmp_path: Path) -> None:
    assert _kill_all(worker, tmp_path, list(PROTOCOLS), KILLS, MANY_ROWS).rows > 10 * KILLS


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", ["no transaction", "vectors after the commit"])
def test_a_guard_taken_out_is_missed(sabotage: str, worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(Lost):
        kill_writers(worker, tmp_path, "gallery", 200, rows=ROWS, sabotage=sabotage)
