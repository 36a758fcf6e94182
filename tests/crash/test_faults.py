"""Every call of every step fails, once and from then on: full disk, I/O error, no permission, no descriptor left, short
writes. The command ends with exit code 5 and one line, or the step is done; what was there before is there; nothing is
left lying about; and the same step works when the fault is over. SIAMESE_FAULTS=1 leaves none out.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from crash.faults import FaultLoop
from crash.protocols import PROTOCOLS
from crash.worker import Worker

DEEP = os.environ.get("SIAMESE_FAULTS") == "1"


@pytest.mark.parametrize("name", ["atomic file"])
def test_some_calls_fail(name: str, worker: Worker, scratch: Path) -> None:
    report = FaultLoop(worker, scratch, every=8).run(name)
    assert report.errors > 5
    assert report.violations == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_call_fails(name: str, worker: Worker, scratch: Path) -> None:
    report = FaultLoop(worker, scratch, every=1 if DEEP else 61 if name == "gallery" else 15).run(name)
    print(f"{name}: {report}")
    assert report.errors > 0
    assert report.violations == []


def test_an_error_that_is_swallowed_is_missed(worker: Worker, scratch: Path) -> None:
    report = FaultLoop(worker, scratch, every=3).run("atomic file", sabotage="errors swallowed")
    assert any("found" in violation for violation in report.violations)


@pytest.mark.slow
def test_a_file_written_in_place_is_missed(worker: Worker, scratch: Path) -> None:
    report = FaultLoop(worker, scratch, every=3).run("atomic file", sabotage="written in place")
    assert any("No space" in violation for violation in report.violations)


@pytest.mark.slow
def test_a_folder_that_is_not_synced_is_missed(worker: Worker, scratch: Path) -> None:
    report = FaultLoop(worker, scratch, steps=1, errors=(errno.EIO,)).run("gallery", sabotage="folder left to SQLite")
    assert any("power lost" in violation for violation in report.violations)
