"""What was acknowledged survives a power cut at any moment, and nothing is found half there.

The embedding cache promises less: a record may be gone, but none is wrong. SIAMESE_REPLAY=1 looks at every call of
every protocol, with 12 random crashes each, and crashes one recovery of four; without it a share of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crash.disk import SECTOR
from crash.protocols import PROTOCOLS
from crash.replay import Replay
from crash.worker import Worker

DEEP = os.environ.get("SIAMESE_REPLAY") == "1"
QUICK = ("atomic file", "replaced bundle", "results")


@pytest.mark.parametrize("name", QUICK)
def test_power_lost_at_some_calls(name: str, worker: Worker, scratch: Path) -> None:
    replay = Replay(worker, scratch, draws=1, recover_every=40)
    assert replay.run(name, steps=1).violations == []


@pytest.mark.slow
def test_power_lost_while_enrolling(worker: Worker, scratch: Path) -> None:
    assert Replay(worker, scratch, draws=1, every=3).run("gallery", steps=2).violations == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_power_lost_at_every_call(name: str, worker: Worker, scratch: Path) -> None:
    large = name == "gallery" and not DEEP
    report = Replay(
        worker,
        scratch,
        draws=12 if DEEP else 1,
        every=5 if large else 1,
        recover_every=4 if DEEP else 150 if large else 30,
    ).run(name)
    print(f"{name}: {report}")
    assert report.violations == []


# Each guard that is taken out must be missed, or the tests above say nothing.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "name", "variant"),
    [
        ("no sync of files", "atomic file", "names before data"),
        ("no sync of folders", "atomic file", "unsynced lost"),
        ("written in place", "atomic file", "last write torn"),
        ("no sync of files", "replaced bundle", "names before data, zeros instead"),
        ("no sync of folders", "new bundle", "unsynced lost"),
        ("no sync of folders", "results", "last name first"),
        ("no sync of files", "gallery", "names before data"),
        ("no sync of folders", "gallery", "unsynced lost"),
        ("lazy SQLite", "gallery", "unsynced lost"),
        ("no transaction", "gallery", "unsynced kept"),
        ("vectors after the commit", "gallery", "unsynced kept"),
        ("no sync of any kind", "engine cache", "unsynced lost"),
    ],
)
def test_a_guard_taken_out_is_missed(sabotage: str, name: str, variant: str, worker: Worker, scratch: Path) -> None:
    report = Replay(worker, scratch, draws=0, every=2 if name == "gallery" else 1).run(name, steps=2, sabotage=sabotage)
    assert report.by_variant[variant] > 0, report


@pytest.mark.slow
def test_a_checksum_taken_out_is_missed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sector was not written, the checksum is all that stands between a torn record and an answer."""
    cache = PROTOCOLS["embedding cache"](scratch, rows=40)
    cache.step(0)
    (file,) = (scratch / "cache").iterdir()
    content = file.read_bytes()

    def wrong_vectors() -> int:
        count = 0
        for start in range(0, len(content), SECTOR):
            file.write_bytes(content[:start] + bytes(SECTOR) + content[start + SECTOR :])
            try:
                cache.view(1)
            except AssertionError as error:
                assert "a wrong vector" in str(error)  # noqa: PT017
                count += 1
        return count

    assert wrong_vectors() == 0
    monkeypatch.setattr("siamese_deploy.cache_file.Row.is_sound", lambda row, n_bytes: len(row.vector) == n_bytes)
    assert wrong_vectors() > 0
