from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.testing  # now, and not by a thread while another one forks: a child of that moment would wait for ever
import pytest
from conftest import RunCommand, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_deploy import cache_file, embedding_cache
from siamese_deploy.cache_file import FILE_NAME
from siamese_deploy.cli import main as siamese
from siamese_deploy.embedding_cache import EmbeddingCache, embedding_key, open_cache
from siamese_deploy.errors import EnvironmentFault, IntegrityError, UsageError
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.verifier import Embeddings

DIM = 64


def key_of(number: int) -> bytes:
    return b"%032d" % number


def vector_of(number: int, dim: int = DIM) -> Embeddings:
    return np.random.RandomState(number).normal(size=dim).astype(np.float32)


def put(cache: EmbeddingCache, *numbers: int, dim: int = DIM) -> None:
    cache.put_many([key_of(n) for n in numbers], np.stack([vector_of(n, dim) for n in numbers]))


def get(cache: EmbeddingCache, *numbers: int, dim: int = DIM) -> set[int]:
    """Those that are there; each of them must be right."""
    found = cache.get_many([key_of(n) for n in numbers], dim)
    for key, vector in found.items():
        assert (vector.dtype, vector.shape) == (np.float32, (dim,))
        np.testing.assert_array_equal(vector, vector_of(int(key), dim))
    return {int(key) for key in found}


def change(cache: EmbeddingCache, statement: str, *values: object) -> None:
    connection = sqlite3.connect(cache.path)
    with connection:
        assert connection.execute(statement, values).rowcount != 0
    connection.close()


def in_fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def test_what_was_put_is_found_by_any_later_process(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        cache = EmbeddingCache(tmp_path / "deep/cache")
        put(cache, *range(1200))
    finally:
        os.umask(mask)
    assert get(cache, *range(1200), 5000) == set(range(1200))
    later = EmbeddingCache(tmp_path / "deep/cache")
    assert get(later, 7, 5000, 7) == {7}
    assert (later.hits, later.misses, later.damaged, later.warning) == (2, 1, 0, "")
    assert later.get_many([], DIM) == {}
    later.put_many([], np.empty((0, DIM), np.float32))
    assert os.listdir(tmp_path / "deep/cache") == [FILE_NAME]
    assert (cache.path.parent.stat().st_mode & 0o777, cache.path.stat().st_mode & 0o777) == (0o700, 0o600)


GOOD: dict[str, Any] = {
    "model_digest": "a" * 64,
    "backend": "onnxruntime",
    "provider": "cpu",
    "runtime_version": "1.23.2",
    "preprocess": Preprocess((224, 224)),
}
TEXT = st.text(max_size=20)
SIDE = st.integers(1, 4096)
PREPROCESS = st.builds(Preprocess, st.tuples(SIDE, SIDE), TEXT, TEXT)
ARGUMENTS = st.fixed_dictionaries(
    {"model_digest": TEXT, "backend": TEXT, "provider": TEXT, "runtime_version": TEXT, "preprocess": PREPROCESS}
)


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), ARGUMENTS, st.binary(min_size=32, max_size=32), ARGUMENTS)
def test_anything_else_has_another_key(one: bytes, first: dict[str, Any], other: bytes, second: dict[str, Any]) -> None:
    key = embedding_key(one, **first)
    assert len(key) == 32
    assert (key == embedding_key(other, **second)) == ((one, first) == (other, second))
    for name, value in second.items():
        assert (key == embedding_key(one, **{**first, name: value})) == (first[name] == value)


def test_every_part_of_the_key_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = bytes(32)
    size = replace(GOOD["preprocess"], size_hw=(224, 225))
    turned = replace(size, size_hw=(225, 224))
    shifted = {"backend": "onnxruntimec", "provider": "pu"}
    changes = [
        {},
        *({name: f"{GOOD[name]}x"} for name in ("model_digest", "backend", "provider", "runtime_version")),
        *({"preprocess": p} for p in (size, turned, replace(size, resize="b"), replace(size, decode="v2"))),
        shifted,
    ]
    keys = {embedding_key(digest, **{**GOOD, **part}) for part in changes} | {embedding_key(bytes([1] * 32), **GOOD)}
    assert len(keys) == len(changes) + 1
    monkeypatch.setattr("PIL.__version__", "99")
    embedding_cache._decoder_versions.cache_clear()
    keys.add(embedding_key(digest, **GOOD))
    embedding_cache._decoder_versions.cache_clear()
    assert len(keys) == len(changes) + 2


def flipped(number: int) -> bytes:
    data = bytearray(vector_of(number).tobytes())
    data[17] ^= 4
    return bytes(data)


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE embeddings SET vector = ? WHERE key = ?", flipped(3)),
        ("UPDATE embeddings SET vector = ? WHERE key = ?", vector_of(4).tobytes()),
        ("UPDATE embeddings SET vector = ? WHERE key = ?", b""),
        ("UPDATE embeddings SET vector = ? WHERE key = ?", 5),
        ("UPDATE embeddings SET vector = CAST(? AS TEXT) WHERE key = ?", b"\xff" * 4 * DIM),
        ("UPDATE embeddings SET checksum = ? WHERE key = ?", bytes(16)),
        # a whole record that belongs to another picture
        (
            "UPDATE embeddings SET (vector, checksum) = (SELECT vector, checksum FROM embeddings WHERE key = ?)"
            " WHERE key = ?",
            key_of(4),
        ),
    ],
)
def test_a_damaged_record_is_a_miss_and_goes(tmp_path: Path, statement: str, value: object) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 3, 4)
    change(cache, statement, value, key_of(3))
    assert get(cache, 3, 4) == {4}
    assert (cache.hits, cache.misses, cache.damaged, cache.warning) == (1, 1, 1, "")
    assert cache.stat().records == 1
    assert get(cache, 3) == set()
    assert cache.damaged == 1
    put(cache, 3)
    assert get(cache, 3, 4) == {3, 4}
    change(cache, statement, value, key_of(3))
    put(cache, 3)  # replaced without having been looked at
    assert get(cache, 3, 4) == {3, 4}


def test_another_length_is_a_miss(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 1, dim=8)
    assert get(cache, 1, dim=16) == set()
    assert cache.damaged == 1
    put(cache, 1, dim=16)
    assert get(cache, 1, dim=16) == {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_neither_kept_nor_given(tmp_path: Path, value: float) -> None:
    cache = EmbeddingCache(tmp_path)
    vectors = np.stack([vector_of(1), vector_of(2)])
    vectors[0, 5] = value
    cache.put_many([key_of(1), key_of(2)], vectors)
    assert get(cache, 1, 2) == {2}
    assert (cache.stat().records, cache.damaged) == (1, 0)
    # one that somebody has stored all the same, checksum and all
    from siamese_deploy.cache_file import insert

    connection = sqlite3.connect(cache.path, isolation_level=None)
    insert(connection, [(key_of(3), vectors[0].tobytes())])
    connection.close()
    assert get(cache, 2, 3) == {2}
    assert (cache.damaged, cache.stat().records) == (1, 1)


def test_the_least_recently_used_go_and_the_file_keeps_to_its_cap(tmp_path: Path) -> None:
    cap = 400_000
    cache = EmbeddingCache(tmp_path, max_bytes=cap)
    favourites = (3, 40, 57)
    sizes = []
    for start in range(0, 600, 60):
        put(cache, *range(start, start + 60), dim=500)
        sizes.append(cache.path.stat().st_size)
        assert get(cache, *favourites, dim=500) == set(favourites)  # used again and again, so never dropped
    assert max(sizes) <= cap
    assert sizes[-1] > 0.8 * cap
    kept = get(cache, *range(600), dim=500)
    assert set(favourites) <= kept
    assert kept - set(favourites) == set(range(600 - len(kept) + len(favourites), 600))  # the newest
    assert cache.warning == ""
    records = len(kept)
    assert cache.prune(200_000) == records - cache.stat().records
    assert 150_000 < cache.path.stat().st_size <= 200_000
    put(cache, *range(2000, 3000), dim=500)  # more than fits
    assert cache.path.stat().st_size <= cap
    assert 2999 in get(cache, *range(3000), dim=500)
    assert cache.prune(0) > 0
    assert cache.stat().records == 0
    assert cache.path.stat().st_size < 50_000


def test_hits_alone_write_once_and_then_never(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, *range(10))
    get(cache, *range(10))
    before = cache.path.read_bytes()
    assert get(cache, *range(5)) == set(range(5))
    assert cache.path.read_bytes() == before


def test_the_rollback_journal_whatever_the_file_says(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 1)
    connection = sqlite3.connect(cache.path)
    assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    connection.close()
    assert get(cache, 1) == {1}
    assert cache.path.read_bytes()[18:20] == b"\1\1"  # of the header: 1 is the journal, 2 the write-ahead log
    assert cache.stat().journal_mode == "delete"


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    def work(first: int) -> None:
        cache = EmbeddingCache(tmp_path / "cache")
        for start in range(first, first + 300, 25):
            new = range(start, start + 25)
            put(cache, *new)
            assert get(cache, *new, *range(0, 900, 7)) >= set(new)
        assert (cache.warning, cache.damaged) == ("", 0)

    children = [in_fork(lambda first=first: work(first)) for first in (0, 300, 200)]
    assert [ended_well(child) for child in children] == [True, True, True]
    cache = EmbeddingCache(tmp_path / "cache")
    assert get(cache, *range(900)) == set(range(600))
    assert cache.stat().records == 600


def test_two_processes_that_make_the_file_at_once(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch(mode=0o600)
    reader, writer = os.pipe()

    def make() -> None:
        connection = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        os.write(writer, b"!")
        time.sleep(0.2)
        for statement in cache_file._SCHEMA:
            connection.execute(statement)
        connection.execute("COMMIT")

    child = in_fork(make)
    os.read(reader, 1)
    cache = EmbeddingCache(tmp_path)  # finds an empty file and waits for the lock
    put(cache, 1)
    assert get(cache, 1) == {1}
    assert ended_well(child)
    os.close(reader)
    os.close(writer)


def test_killed_at_any_moment_every_record_is_whole(tmp_path: Path) -> None:
    random.seed(0)
    first, acknowledged = 0, set[int]()
    for attempt in range(10):
        reader, writer = os.pipe()

        def fill(first: int = first, writer: int = writer) -> None:
            cache = EmbeddingCache(tmp_path, max_bytes=2**30)
            for start in range(first, first + 100_000, 5):
                put(cache, *range(start, start + 5))
                assert cache.warning == ""
                os.write(writer, b"%d\n" % start)

        child = in_fork(fill)
        os.close(writer)
        with open(reader) as lines:
            if attempt > 2:  # the first ones may die while they make the file
                acknowledged.add(int(lines.readline()))
            time.sleep(random.random() / 20)  # noqa: S311
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged |= {start for line in lines for start in range(int(line), int(line) + 5)}
        first = max(acknowledged, default=-5) + 100
    cache = EmbeddingCache(tmp_path)
    found = get(cache, *range(first + 100))
    assert len(acknowledged) >= 7
    assert found >= acknowledged
    assert len(found) == cache.stat().records
    assert (cache.damaged, cache.warning) == (0, "")


def test_a_forked_child_and_its_parent_use_it_at_once(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 0)

    def work(first: int) -> None:
        for number in range(first, first + 8):
            assert get(cache, 0) == {0}
            put(cache, number)
        assert cache.warning == ""

    children = []
    thread = threading.Thread(target=work, args=(1000,))
    thread.start()
    for n in range(1, 4):  # while the thread is inside SQLite
        children.append(in_fork(lambda n=n: work(100 * n)))
        time.sleep(0.01)
    thread.join()
    assert all([ended_well(child) for child in children])
    assert get(cache, *range(2000)) == {0, *(100 * n + i for n in (1, 2, 3, 10) for i in range(8))}


def test_a_fork_waits_until_no_thread_is_inside(tmp_path: Path) -> None:
    from siamese_deploy.cache_file import opened

    inside, leave = threading.Event(), threading.Event()
    EmbeddingCache(tmp_path)

    def stay() -> None:
        with opened(tmp_path / FILE_NAME, 1):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    threading.Timer(0.1, leave.set).start()
    start = time.monotonic()
    assert ended_well(in_fork(lambda: put(EmbeddingCache(tmp_path), 1)))
    assert time.monotonic() - start > 0.09
    thread.join()


def test_folders_that_cannot_be_believed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir(mode=0o700)
    (tmp_path / "linked" / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / FILE_NAME).mkdir(parents=True)
    for name, kind, words in (
        ("open", EnvironmentFault, "others may write"),
        ("file", UsageError, "is a file"),
        ("linked", IntegrityError, "not a regular file"),
        ("folder", IntegrityError, "not a regular file"),
    ):
        with pytest.raises(kind, match=words):
            open_cache(tmp_path / name)
    assert not (tmp_path / "elsewhere").exists()
    cache = EmbeddingCache(tmp_path / "cache")
    os.link(cache.path, tmp_path / "second")
    with pytest.raises(IntegrityError, match="hard link"):
        open_cache(tmp_path / "cache")
    put(cache, 1)
    assert get(cache, 1) == set()
    assert "hard link" in cache.warning
    (tmp_path / "second").unlink()
    put(cache, 1)  # this process has stopped
    assert EmbeddingCache(tmp_path / "cache").stat().records == 0


def foreign_files(folder: Path) -> dict[str, bytes]:
    """By what is wrong with them."""
    contents = {"text": b"my notes, not yours " * 500, "short": b"SQLite format 3\0"}
    for name, statements in {
        "another application": ["PRAGMA application_id=7", "CREATE TABLE t (x)"],
        "no application": ["CREATE TABLE embeddings (x)"],
        "a version alone": ["PRAGMA user_version=1"],
    }.items():
        connection = sqlite3.connect(folder / "made")
        for statement in statements:
            connection.execute(statement)
        connection.close()
        contents[name] = (folder / "made").read_bytes()
        (folder / "made").unlink()
    return contents


def test_what_is_not_ours_is_left_alone(tmp_path: Path, run: RunCommand) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for name, content in foreign_files(tmp_path).items():
        (folder / FILE_NAME).write_bytes(content)
        with pytest.raises(IntegrityError, match=r"no embedding cache|not an embedding cache") as error:
            open_cache(folder)
        assert "\n" not in str(error.value)
        for command in ("stat", "prune", "clear"):
            assert_refused(run(siamese, "cache", command, "--cache", folder), 4, str(folder))
        assert (folder / FILE_NAME).read_bytes() == content, name
        assert os.listdir(folder) == [FILE_NAME]


def test_a_newer_format_is_left_alone(tmp_path: Path, run: RunCommand) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 1)
    change(cache, "PRAGMA user_version=2")
    before = cache.path.read_bytes()
    with pytest.raises(IntegrityError, match=r"format 2, expected 1.*run: siamese cache clear --cache"):
        open_cache(tmp_path)
    put(cache, 2)
    assert get(cache, 1) == set()
    assert "format 2" in cache.warning
    assert cache.path.read_bytes() == before
    assert run(siamese, "cache", "clear", "--cache", tmp_path).exit_code == 0  # ours, and asked for
    assert not cache.path.exists()


def test_damage_anywhere_is_never_a_wrong_hit(tmp_path: Path) -> None:
    whole = EmbeddingCache(tmp_path / "whole")
    put(whole, *range(150))
    content = whole.path.read_bytes()
    folder = tmp_path / "damaged"
    folder.mkdir(mode=0o700)
    stopped = 0
    for seed in range(60):
        rng = random.Random(seed)  # noqa: S311
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            start = rng.randrange(len(damaged))
            damaged[start : start + rng.choice((1, 4, 400))] = rng.randbytes(rng.choice((1, 4, 400)))
        (folder / FILE_NAME).write_bytes(damaged[: rng.randrange(len(damaged))] if seed % 5 == 0 else damaged)
        try:
            cache, note = open_cache(folder)
        except (IntegrityError, EnvironmentFault):
            continue
        assert cache is not None
        assert note == ""
        get(cache, *range(300))
        put(cache, *range(140, 160))
        get(cache, *range(300))
        stopped += bool(cache.warning)
        assert "\n" not in cache.warning
    assert 5 < stopped < 60


def test_overwritten_in_the_middle_it_stops_until_it_is_cleared(tmp_path: Path, run: RunCommand) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, *range(300))
    size = cache.path.stat().st_size
    with open(cache.path, "r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * (size - 8192 - 4096))
    assert get(cache, *range(300)) == set()
    assert "malformed" in cache.warning
    assert "run: siamese cache clear --cache " in cache.warning
    put(cache, 1)
    assert get(cache, 1) == set()
    assert cache.misses == 301
    assert cache.path.stat().st_size == size  # never removed without being asked to
    assert run(siamese, "cache", "clear", "--cache", tmp_path).exit_code == 0
    fresh = EmbeddingCache(tmp_path)
    put(fresh, 1)
    assert get(fresh, 1) == {1}


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE usage", "CREATE TRIGGER t AFTER INSERT ON usage BEGIN DELETE FROM embeddings; END"],
)
def test_with_another_schema_it_stops_until_it_is_cleared(tmp_path: Path, statement: str) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 1)
    change(cache, statement)
    assert get(cache, 1) == set()
    assert "its schema is not what it was made with" in cache.warning
    assert "run: siamese cache clear" in cache.warning
    put(cache, 2)
    with pytest.raises(IntegrityError, match="its schema"):
        EmbeddingCache(tmp_path)


@pytest.mark.parametrize("room", [0, 9_000, 30_000, 45_000, 70_000, 90_000])
def test_a_full_disk_costs_no_answer(tmp_path: Path, room: int) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            cache = EmbeddingCache(tmp_path)
        except EnvironmentFault:
            assert room < 40_000
            return
        for start in range(0, 400, 50):
            put(cache, *range(start, start + 50))
            get(cache, *range(start))
        assert cache.warning.startswith("embeddings are no longer cached: ")

    assert ended_well(in_fork(fill))
    cache = EmbeddingCache(tmp_path)
    found = get(cache, *range(400))
    assert found == set(range(len(found)))
    assert len(found) < 400
    put(cache, *range(400))  # there is room again
    assert get(cache, *range(400)) == set(range(400))
    assert (cache.warning, cache.damaged) == ("", 0)


def test_a_read_only_cache_is_read(tmp_path: Path) -> None:
    put(EmbeddingCache(tmp_path), 1, 2)
    (tmp_path / FILE_NAME).chmod(0o400)
    tmp_path.chmod(0o500)
    code = """
import sys, test_embedding_cache as t
cache = t.EmbeddingCache(t.Path(sys.argv[1]))
assert t.get(cache, 1, 2, 3) == {1, 2} and cache.warning == "", cache.warning
t.put(cache, 3)
assert "readonly" in cache.warning, cache.warning
assert t.get(cache, 1) == set()
"""

    def without_roots_powers() -> None:
        for capability in (1, 2):  # to write and read whatever the permissions
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    before = (tmp_path / FILE_NAME).read_bytes()
    try:
        command = [sys.executable, "-c", code, str(tmp_path)]
        subprocess.run(command, check=True, env=here, preexec_fn=without_roots_powers)
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_lock_costs_one_operation_and_not_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunCommand
) -> None:
    monkeypatch.setattr("siamese_deploy.embedding_cache.PATIENCE_S", 0.25)
    monkeypatch.setattr("siamese_deploy.cache_file.PATIENCE_S", 0.25)
    cache = EmbeddingCache(tmp_path)
    put(cache, 1)
    holder = sqlite3.connect(cache.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    waited = []
    for _ in range(2):
        start = time.monotonic()
        assert get(cache, 1) == set()
        waited.append(time.monotonic() - start)
    put(cache, 2)
    assert waited[0] > 0.2 > waited[1]  # not for as long again
    for command in ("stat", "clear"):
        assert_refused(run(siamese, "cache", command, "--cache", tmp_path), 6, "locked")
    assert open_cache(tmp_path)[1] == ""
    holder.execute("ROLLBACK")
    holder.execute("BEGIN IMMEDIATE")  # a writer keeps nobody from reading
    patient = EmbeddingCache(tmp_path)
    start = time.monotonic()
    assert get(patient, 1, 2) == {1}
    assert time.monotonic() - start < 0.2
    assert_refused(run(siamese, "cache", "clear", "--cache", tmp_path), 6, "locked")
    holder.close()
    put(cache, 2)
    assert get(cache, 1, 2) == {1, 2}
    assert cache.warning == ""


def test_removed_while_in_use_it_begins_anew(tmp_path: Path, run: RunCommand) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    put(cache, 1)
    assert run(siamese, "cache", "clear", "--cache", tmp_path / "cache").exit_code == 0
    assert get(cache, 1) == set()
    put(cache, 2)
    assert get(cache, 1, 2) == {2}
    shutil.rmtree(tmp_path / "cache")
    assert get(cache, 1, 2) == set()
    assert "No such file" in cache.warning


def test_the_default_folder_never_costs_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, note = open_cache()
    assert cache is not None
    assert (cache.path, note) == (tmp_path / "siamese-toolkit/embeddings" / FILE_NAME, "")
    cache.path.write_text("something else")
    cache, note = open_cache()
    assert cache is None
    assert note.endswith("run: siamese cache clear")
    cache_folder = tmp_path / "siamese-toolkit/embeddings"
    cache_folder.chmod(0o777)
    assert "others may write" in open_cache()[1]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no")
    assert open_cache()[0] is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    cache, note = open_cache()
    assert cache is None
    assert "no home folder" in note


def test_a_folder_that_cannot_be_made_is_the_environments_fault() -> None:
    with pytest.raises(EnvironmentFault, match=r"/proc/no.*--no_cache"):
        open_cache(Path("/proc/no/cache"))


@pytest.mark.parametrize("name", [b"a b?c#d%41", b"caf\xe9", "\N{SNOWMAN}\n".encode()])
def test_any_name_of_the_folder(tmp_path: Path, name: bytes, run: RunCommand) -> None:
    folder = tmp_path / os.fsdecode(name)
    cache = EmbeddingCache(folder)
    put(cache, 1)
    assert get(cache, 1) == {1}
    assert os.listdir(tmp_path) == [os.fsdecode(name)]
    assert len(run(siamese, "cache", "stat", "--cache", folder).stdout.splitlines()) == 5
    assert json.loads(run(siamese, "cache", "stat", "--json", "--cache", folder).stdout)["path"] == str(cache.path)


def test_stat(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run(siamese, "cache", "stat")
    assert result.exit_code == 0
    assert "(no cache yet)\nrecords: 0\nsize: 0 of" in result.stdout
    assert os.listdir(tmp_path) == []  # looking makes nothing
    cache, _ = open_cache()
    assert cache is not None
    put(cache, 1, 2, 3)
    found = json.loads(run(siamese, "cache", "stat", "--json").stdout)
    assert found.pop("file_system")
    assert found == {
        "path": str(cache.path),
        "records": 3,
        "bytes": cache.path.stat().st_size,
        "max_bytes": 512 * 2**20,
        "sqlite_version": sqlite3.sqlite_version,
        "journal_mode": "delete",
    }
    text = run(siamese, "cache", "stat").stdout
    assert f"path: {cache.path}\nrecords: 3\nsize: {found['bytes']:,} of at most 536,870,912 bytes\n" in text
    assert asdict(cache.stat())["file_bytes"] == found["bytes"]


def test_a_network_file_system_is_told(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siamese_deploy.cli.cache._file_system", lambda _: "nfs4")
    result = run(siamese, "cache", "stat", "--cache", tmp_path)
    assert (result.exit_code, len(result.stderr.splitlines())) == (0, 1)
    assert "on nfs4" in result.stderr
    assert "file system: nfs4" in result.stdout


def test_prune(tmp_path: Path, run: RunCommand) -> None:
    assert run(siamese, "cache", "prune", "--cache", tmp_path / "none").stdout.startswith("no cache at ")
    assert not (tmp_path / "none").exists()
    cache = EmbeddingCache(tmp_path)
    put(cache, *range(600))
    assert run(siamese, "cache", "prune", "--cache", tmp_path).stdout.startswith("dropped 0 of 600 records: ")
    for size, number in (("200kB", 200_000), ("0.1 MiB", 104_857), ("80000", 80_000), ("0", 24_576)):
        result = run(siamese, "cache", "prune", "--cache", tmp_path, "--max-size", size)
        assert (result.exit_code, result.stderr) == (0, "")
        assert cache.path.stat().st_size <= number
    for size in ("-1", "x", "5xB", "iB", "nan", ""):
        assert_refused(run(siamese, "cache", "prune", "--cache", tmp_path, "--max_bytes", size), 2, "500MB")


def test_clear_takes_our_files_and_no_others(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(siamese, "cache", "clear").stdout.startswith("no cache at ")
    cache, _ = open_cache()
    assert cache is not None
    put(cache, 1)
    mine = cache.path.with_name("mine.txt")
    mine.write_text("mine")
    result = run(siamese, "cache", "clear")
    assert (result.exit_code, result.stdout.startswith(f"removed {cache.path} (")) == (0, True)
    assert os.listdir(cache.path.parent) == ["mine.txt"]
    # A damaged header says no longer whose it is: believed in our own folder alone.
    for folder, exit_code in ((cache.path.parent, 0), (tmp_path / "other", 4)):
        folder.mkdir(exist_ok=True)
        (folder / FILE_NAME).write_bytes(b"\xa5" * 9000)
        (folder / f"{FILE_NAME}-journal").write_bytes(b"\xa5" * 900)
        assert run(siamese, "cache", "clear", "--cache", folder).exit_code == exit_code
        assert os.listdir(folder) == (["mine.txt"] if exit_code == 0 else [FILE_NAME])


def test_clear_knows_its_own_file_by_what_is_left_of_the_header(tmp_path: Path, run: RunCommand) -> None:
    cache = EmbeddingCache(tmp_path)
    put(cache, 1)
    with open(cache.path, "r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 3000)
    for suffix in ("-journal", "-wal", "-shm"):
        (tmp_path / f"{FILE_NAME}{suffix}").write_bytes(b"\xa5" * 900)
    with pytest.raises(IntegrityError, match="malformed"):
        open_cache(tmp_path)
    assert run(siamese, "cache", "clear", "--cache", tmp_path).exit_code == 0
    assert os.listdir(tmp_path) == []


def test_the_group_alone_says_what_is_missing(run: RunCommand) -> None:
    assert_refused(run(siamese, "cache"), 2, "Missing command")
    assert_refused(run(siamese, "cache", "vacuum"), 2, "vacuum")
    assert "prune" in run(siamese, "cache", "--help").stdout
