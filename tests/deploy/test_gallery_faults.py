"""A gallery on a full or failing disk, in several processes, put back from a copy, and interrupted."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, assert_refused
from PIL import Image

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.cli import main as siamese
from siamese_deploy.errors import EnvironmentFault, IntegrityError
from siamese_deploy.gallery import store as store_module
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.store import DATABASE, GalleryStore

DIM = 64
SIAMESE = (sys.executable, "-c", "from siamese_deploy.cli import main; main()")


def group_of(number: int, rows: int = 3, dim: int = DIM) -> Group:
    """An identity whose vectors all hold its number."""
    name = f"id{number}"
    pictures = [StoredPicture(name, b"%016d%016d" % (number, k), "") for k in range(rows)]
    return Group(name, pictures, np.full((rows, dim), number + 1, np.float32))


def held(folder: Path) -> dict[str, set[float]]:
    """Every sound row: identity -> the numbers in its vectors. No row may be damaged."""
    found: dict[str, set[float]] = {}
    with GalleryStore(folder).snapshot() as snapshot:
        assert snapshot.rows.damaged == 0
        assert sum(len(row) for row, _ in snapshot.sound_vectors()) == len(snapshot.rows.slots)
        for row, vectors in snapshot.sound_vectors():
            for index, vector in zip(row, vectors, strict=True):
                found.setdefault(snapshot.rows.names[snapshot.rows.identities[index]], set()).update(vector.tolist())
    return found


def in_child(work: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


# --- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "dim"), [(0, 64), (4_000, 64), (20_000, 64), (38_000, 64), (60_000, 64), (50_000, 1024), (90_000, 4000)]
)
def test_a_full_disk_costs_the_enrolment_and_nothing_that_is_there(tmp_path: Path, room: int, dim: int) -> None:
    """No file may grow beyond `room` bytes: SQLite's, or with long vectors theirs, is the first to notice."""
    folder = tmp_path / "gallery"
    done, stopped = tmp_path / "done", tmp_path / "stopped"

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            store = GalleryStore.create(folder, "digest", dim)
            for number in range(100):
                store.enrol([group_of(number, dim=dim)])
                done.with_name(f"done-{number}").touch()
        except EnvironmentFault:
            stopped.touch()

    assert in_child(fill)
    assert stopped.exists()
    acknowledged = {f"id{path.name.removeprefix('done-')}" for path in tmp_path.glob("done-*")}
    store = GalleryStore.create(folder, "digest", dim)  # there is room again
    assert set(held(folder)) == acknowledged
    store.enrol([group_of(number, dim=dim) for number in range(100)], add=True)
    assert held(folder) == {f"id{number}": {number + 1.0} for number in range(100)}


def test_a_full_disk_is_exit_code_5(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    command = (*SIAMESE, "gallery", "enrol", tmp_path / "gallery", pictures, "-c", tiny_bundle, "--no_cache")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
    )
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "enrolled" not in done.stdout


@pytest.mark.parametrize("of", [stat.S_ISREG, stat.S_ISDIR])
def test_a_failed_sync_is_never_taken_for_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: Callable[[int], bool]
) -> None:
    """After it, nobody knows what is on the disk: the rows are not acknowledged, and the next attempt writes anew."""
    store = GalleryStore.create(tmp_path / "gallery", "digest", DIM)
    store.enrol([group_of(0)])

    sync = os.fsync

    def fail(descriptor: int) -> None:
        if of(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for _ in range(2):
            with pytest.raises(EnvironmentFault, match="Input/output error; nothing was enrolled"):
                store.enrol([group_of(1)])
    assert held(tmp_path / "gallery") == {"id0": {1.0}}
    store.enrol([group_of(1)])
    assert held(tmp_path / "gallery") == {"id0": {1.0}, "id1": {2.0}}


def test_a_row_is_named_only_after_its_vector_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives a power cut: write, sync the file and its folder, commit; and SQLite syncs its own."""
    store = GalleryStore.create(tmp_path / "gallery", "digest", DIM)
    store.enrol([group_of(0), group_of(1)])
    store.remove(["id0"])
    events: list[str] = []
    connections: list[sqlite3.Connection] = []
    connect, write, sync = sqlite3.connect, os.pwrite, os.fsync

    def traced(*values: object, **more: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*values, **more)  # type: ignore[call-overload]
        connection.set_trace_callback(lambda statement: events.append(" ".join(statement.split()[:3])))
        connections.append(connection)
        return connection

    def synced(descriptor: int) -> None:
        sync(descriptor)
        events.append("sync")
        settings = [connections[-1].execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
        assert settings == [3, "delete"]  # 3 is EXTRA

    monkeypatch.setattr(store_module.sqlite3, "connect", traced)
    monkeypatch.setattr(os, "pwrite", lambda *values: events.append("write") or write(*values))
    monkeypatch.setattr(os, "fsync", synced)

    def what_happened() -> list[str]:
        kept = ("INSERT INTO picture", "DELETE FROM picture", "COMMIT", "write", "sync")
        return [event for event in events if event in kept]

    store.enrol([group_of(2, rows=1)])
    happened = what_happened()
    first = happened.index("INSERT INTO picture")
    assert happened[first : first + 5] == ["INSERT INTO picture", "write", "sync", "sync", "COMMIT"]
    assert "write" not in happened[first + 5 :]
    events.clear()
    store.remove(["id1"])  # and a slot is wiped only when nobody names it any more
    happened = what_happened()
    wiped = happened.index("write")
    assert happened[:4] == [*["DELETE FROM picture"] * 3, "COMMIT"]
    assert happened[wiped : wiped + 4] == ["write", "sync", "sync", "COMMIT"]


# --- other processes, forks, copies --------------------------------------------------------------------------------


def test_a_gallery_that_is_held_is_busy_and_free_again_when_its_holder_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunCommand
) -> None:
    monkeypatch.setattr(store_module, "_BUSY_S", 0.2)
    GalleryStore.create(tmp_path, "digest", DIM).enrol([group_of(0)])
    code = (
        "import sqlite3, sys, time\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "database.execute('BEGIN EXCLUSIVE')\n"
        "print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / DATABASE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = run(siamese, "gallery", "remove", tmp_path, "id0")
        holder.kill()
    assert_refused(result, 6, "another process has held it", "try again")
    assert run(siamese, "gallery", "remove", tmp_path, "id0").exit_code == 0  # nobody has to clean up after it


def test_nothing_stays_open_between_two_calls_so_that_a_fork_takes_nothing_over(tmp_path: Path) -> None:
    store = GalleryStore.create(tmp_path, "digest", DIM)
    store.enrol([group_of(0)])
    held(tmp_path)
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdecimal()
             and os.path.lexists(f"/proc/self/fd/{name}")]  # fmt: skip
    assert not [file for file in files if file.startswith(str(tmp_path))]
    children = []
    for first in (10, 20):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                for number in range(first, first + 5):
                    store.enrol([group_of(number)])
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
        children.append(child)
    for number in range(1, 6):
        store.enrol([group_of(number)])
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    numbers = [*range(6), *range(10, 15), *range(20, 25)]
    assert held(tmp_path) == {f"id{number}": {number + 1.0} for number in numbers}


def test_an_old_database_over_newer_vectors_never_names_the_wrong_person(tmp_path: Path) -> None:
    """Half of a gallery put back from a copy: slots have been given to others since."""
    store = GalleryStore.create(tmp_path / "gallery", "digest", DIM)
    store.enrol([group_of(0), group_of(1)])
    old = (tmp_path / "gallery" / DATABASE).read_bytes()
    store.remove(["id0"])
    store.enrol([group_of(7), group_of(8)])
    (tmp_path / "gallery" / DATABASE).write_bytes(old)
    with store.snapshot() as snapshot:
        names = snapshot.rows.names
        found = [
            (names[snapshot.rows.identities[index]], set(vector.tolist()))
            for row, vectors in snapshot.sound_vectors()
            for index, vector in zip(row, vectors, strict=True)
        ]
        assert (len(snapshot.rows.slots), names) == (6, ("id0", "id1"))
    assert found == [("id1", {2.0})] * 3  # of the other, no row is believed


def test_a_database_without_its_vectors_matches_nobody(tmp_path: Path, run: RunCommand) -> None:
    store = GalleryStore.create(tmp_path / "gallery", "digest", DIM)
    store.enrol([group_of(0)])
    (tmp_path / "copy").mkdir(mode=0o700)
    shutil.copy(tmp_path / "gallery" / DATABASE, tmp_path / "copy")
    listed = run(siamese, "gallery", "list", tmp_path / "copy")
    assert "warning: 3 rows are damaged and are never matched" in listed.stderr


def test_a_gallery_on_a_network_drive_is_told_of(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol = ("gallery", "enrol", tmp_path / "g", pictures / "apple/0.png", "--name", "a", "-c", tiny_bundle)
    assert run(siamese, *enrol).stderr == ""
    monkeypatch.setattr("siamese_deploy.cli.cache._file_system", lambda _: "nfs4")
    result = run(siamese, *enrol)
    assert result.exit_code == 0
    assert "g: on nfs4, where locks may not work between machines; let only one process write" in result.stderr


# --- names, numbers and signals ------------------------------------------------------------------------------------


def test_a_name_is_data_and_no_path(run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    picture = pictures / "apple/0.png"
    for number, name in enumerate(("../../x", "/etc/passwd", "-rf", "a;b", "CON", "'; DROP TABLE identity; --", "🎱")):
        picture = pictures / ("apple", "bolt")[number // 4] / f"{number % 4}.png"
        enrolled = run(siamese, "gallery", "enrol", tmp_path / "g", picture, f"--name={name}", "-c", tiny_bundle)
        assert enrolled.exit_code == 0, enrolled.stderr
        found = run(siamese, "gallery", "list", tmp_path / "g")
        assert f"     1  {name}" in found.stdout.splitlines()
    assert sorted({*os.listdir(tmp_path)} - {"g", "xdg-cache"}) == [name for name in before if name != "xdg-cache"]
    assert len(os.listdir(tmp_path / "g")) == 2
    assert run(siamese, "gallery", "remove", tmp_path / "g", "--", "../../x", "-rf").exit_code == 0
    for name in ("", "\udcff", "a\nb", "x" * 10_240):
        assert_refused(run(siamese, "gallery", "remove", tmp_path / "g", "--", name), 2, "printable characters")


def test_more_candidates_than_there_are_and_none(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    picture = pictures / "apple/0.png"
    assert run(siamese, "gallery", "enrol", tmp_path / "g", picture, "--name", "a", "-c", tiny_bundle).exit_code == 0
    identify = ("gallery", "identify", tmp_path / "g", picture, "-c", tiny_bundle, "--threshold", 0, "--top")
    result = run(siamese, *identify, 10**9)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 2)
    for top in ("0", "-1", "1.5", "nan"):
        assert_refused(run(siamese, *identify, top), 2, "--top")


def test_vectors_of_another_length_are_refused(tmp_path: Path) -> None:
    """A database that names a vector file of another dimension has no sound row."""
    store = GalleryStore.create(tmp_path / "gallery", "digest", DIM)
    store.enrol([group_of(0)])
    database = sqlite3.connect(tmp_path / "gallery" / DATABASE)
    with database:
        database.execute("UPDATE model SET dim = 63")
    database.close()
    with pytest.raises(IntegrityError, match="model record"):
        held(tmp_path / "gallery")


@pytest.mark.parametrize(
    ("number", "exit_code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_interrupted_it_keeps_whole_identities_and_goes_on_later(
    run: RunCommand, tiny_bundle: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    random = np.random.RandomState(0)
    for who in range(100):
        (tmp_path / f"pictures/{who:03}").mkdir(parents=True)
        for k in range(6):
            pixels = random.randint(0, 256, (24, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pictures/{who:03}/{k}.bmp")
    folder = tmp_path / "gallery"
    command = ("gallery", "enrol", folder, tmp_path / "pictures", "-c", tiny_bundle, "--no_cache", "--no_doubles")
    with subprocess.Popen((*SIAMESE, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("vectors-*.f32")):  # it has begun to enrol
            assert time.monotonic() < deadline
            time.sleep(0.001)
        sent = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode == exit_code, stderr
    assert len(stderr.splitlines()) <= 1
    assert "enrolled:" not in stdout
    counts: dict[str, int] = {}
    for picture in GalleryStore(folder).pictures():
        assert not picture.damaged
        counts[picture.name] = counts.get(picture.name, 0) + 1
    assert set(counts.values()) == {6}
    assert 0 < len(counts) < 100
    again = run(siamese, *command)
    assert again.exit_code == 0
    assert f"enrolled: {6 * (100 - len(counts))} pictures of {100 - len(counts)} identities" in again.stdout


def test_an_answer_says_by_which_threshold_and_which_bundle(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    picture = pictures / "apple/0.png"
    run(siamese, "gallery", "enrol", tmp_path / "g", picture, "--name", "a", "-c", tiny_bundle)
    identify = ("gallery", "identify", tmp_path / "g", picture, "-c", tiny_bundle, "--json")
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    for threshold, expected in (((), verifier.threshold), (("--threshold", 0.25), 0.25)):
        answer = json.loads(run(siamese, *identify, *threshold).stdout)
        assert (answer["threshold"], answer["bundle_digest"]) == (expected, verifier.model_digest)
    assert Gallery(tmp_path / "g", verifier).identify(picture).threshold == verifier.threshold
