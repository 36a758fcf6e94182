from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from siamese_deploy.engine_cache import (
    MANIFEST,
    default_engine_root,
    engine_folder,
    prune_engines,
    published_engines,
)
from siamese_deploy.errors import BusyError, EnvironmentFault, UsageError
from siamese_deploy.tensorrt import EngineKey

KEY = EngineKey(
    graph_sha256="ab" * 32,
    graph="backbone",
    gpu="NVIDIA Orin, 8.7, 8 SM, aarch64",
    driver="540.4.0, CUDA 12.6",
    tensorrt="10.3.0",
    onnxruntime="1.23.2",
    precision="fp16",
    batch=(1, 8, 32),
)
OTHERS = {
    "graph_sha256": "cd" * 32,
    "graph": "head",
    "gpu": "NVIDIA Orin, 8.7, 16 SM, aarch64",
    "driver": "540.5.0, CUDA 12.6",
    "tensorrt": "10.13.3",
    "onnxruntime": "1.23.1",
    "precision": "fp32",
    "batch": (1, 8, 64),
}
FILES = {"a.engine": b"engine" * 1000, "a.profile": b"profile", "cc87.timing": b"timing"}


def nobody_is_told(line: str) -> None:
    raise AssertionError(line)


def build(root: Path, key: EngineKey = KEY, say: Callable[[str], None] = nobody_is_told) -> Path:
    """What a session does that finds no engine: write files into the folder."""
    with engine_folder(root, key, say=say) as folder:
        assert not folder.ready
        assert folder.path is not None
        assert os.listdir(folder.path) == []
        for name, data in FILES.items():
            (folder.path / name).write_bytes(data)
    return folder.path


def is_ready(root: Path, key: EngineKey = KEY) -> tuple[bool, list[str]]:
    """Whether an engine is found, and what was said."""
    said: list[str] = []

    class NotToPublishError(Exception):
        pass

    try:
        with engine_folder(root, key, say=said.append) as folder:
            raise NotToPublishError
    except NotToPublishError:
        return folder.ready, said


def test_the_name_depends_on_every_field() -> None:
    assert set(OTHERS) == {field.name for field in fields(EngineKey)}
    keys = [KEY, *(replace(KEY, **{name: value}) for name, value in OTHERS.items())]  # type: ignore[arg-type]
    names = [key.folder_name() for key in keys]
    assert len(set(names)) == len(keys)
    assert replace(KEY).folder_name() == names[0]
    assert names[0] == "backbone-1e8489210df3bceac37cc8e4869ff387"  # the same on every machine and every Python


@pytest.mark.parametrize(
    "wrong", [{"graph": "backbone.onnx"}, {"batch": (0, 1, 1)}, {"batch": (1, 9, 8)}, {"batch": (2, 1, 8)}]
)
def test_impossible_keys_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        replace(KEY, **wrong)  # type: ignore[arg-type]


def test_a_built_engine_is_found_by_its_own_key_alone(tmp_path: Path) -> None:
    path = build(tmp_path / "engines")
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with engine_folder(path.parent, KEY, say=nobody_is_told) as folder:
        assert folder.ready
        assert folder.path == path
        assert {name: (path / name).read_bytes() for name in FILES} == FILES
    for name, value in OTHERS.items():
        assert is_ready(path.parent, replace(KEY, **{name: value})) == (False, [])  # type: ignore[arg-type]
    assert is_ready(path.parent) == (True, [])


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "a.engine").read_bytes())
    data[3000] ^= 1
    (path / "a.engine").write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path / "a.engine", 100)


def add_a_file(path: Path) -> None:
    (path / "b.engine").write_bytes(b"another")


def remove_a_file(path: Path) -> None:
    (path / "a.profile").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def cut_the_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 200)


def nest_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[" * 100_000)


def list_as_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[]")


def link_a_file(path: Path) -> None:
    (path / "a.engine").rename(path.parent / "elsewhere")
    (path / "a.engine").symlink_to(path.parent / "elsewhere")


def pipe_as_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)  # reading it would wait for ever


def add_a_folder(path: Path) -> None:
    (path / "folder").mkdir()


def let_the_group_in(path: Path) -> None:
    path.chmod(0o770)


def link_the_folder(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def put_a_file_in_its_place(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.write_text("no folder")


DAMAGE: dict[Callable[[Path], None], str] = {
    flip_a_bit: "changed, added or missing since it was built: a.engine;",
    truncate: "changed, added or missing since it was built: a.engine;",
    add_a_file: "changed, added or missing since it was built: b.engine;",
    remove_a_file: "changed, added or missing since it was built: a.profile;",
    remove_the_manifest: "its build did not end;",
    cut_the_manifest: "damaged (",
    nest_the_manifest: "damaged (",
    list_as_manifest: "its manifest is damaged",
    link_a_file: "damaged (a.engine is no plain file of this user)",
    pipe_as_manifest: "damaged (manifest.json is no plain file of this user)",
    add_a_folder: "damaged (folder is no plain file of this user)",
    let_the_group_in: "expected a folder of this user, with mode 0700",
    link_the_folder: "expected a folder of this user, with mode 0700",
    put_a_file_in_its_place: "expected a folder of this user, with mode 0700",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_not_used_and_built_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = build(tmp_path)
    damage(path)
    said: list[str] = []
    assert build(tmp_path, say=said.append) == path
    assert len(said) == 1
    assert said[0].startswith(f"{path}: {DAMAGE[damage]}")
    assert said[0].endswith("not used, and built again")
    assert is_ready(tmp_path) == (True, [])
    if (tmp_path / "elsewhere").is_dir():
        assert len(os.listdir(tmp_path / "elsewhere")) == 4  # what a link points to is somebody else's


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(("name", "words"), [("", "of this user, with mode"), ("a.engine", "no plain file of this")])
def test_what_belongs_to_somebody_else_is_not_used(tmp_path: Path, name: str, words: str) -> None:
    path = build(tmp_path)
    os.chown(path / name, 12345, -1)
    ready, said = is_ready(tmp_path)
    assert not ready
    assert words in said[0]


@pytest.mark.parametrize("name", OTHERS)
def test_the_entry_of_another_key_copied_over_is_not_used(tmp_path: Path, name: str) -> None:
    path = build(tmp_path)
    other = build(tmp_path, replace(KEY, **{name: OTHERS[name]}))  # type: ignore[arg-type]
    (path / MANIFEST).write_bytes((other / MANIFEST).read_bytes())
    ready, said = is_ready(tmp_path)
    assert not ready
    assert "its manifest is damaged or belongs to another engine" in said[0]


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "engines")
    (tmp_path / "engines").chmod(0o770)
    with (
        pytest.raises(EnvironmentFault, match="others may write"),
        engine_folder(tmp_path / "engines", KEY, say=nobody_is_told),
    ):
        pytest.fail("opened")
    with pytest.raises(EnvironmentFault, match="others may write"):
        prune_engines(tmp_path / "engines", ())


def test_a_file_in_the_way_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("mine")
    with pytest.raises(UsageError, match="is a file"), engine_folder(tmp_path / "engines", KEY, say=nobody_is_told):
        pytest.fail("opened")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_build_publishes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), engine_folder(tmp_path, KEY, say=nobody_is_told) as folder:
        assert folder.path is not None
        (folder.path / "a.engine").write_bytes(b"half")
        raise error
    assert published_engines(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.folder_name()}.lock"]
    build(tmp_path)


def test_a_failure_with_a_ready_engine_keeps_it(tmp_path: Path) -> None:
    build(tmp_path)
    for _ in range(2):
        assert is_ready(tmp_path) == (True, [])  # which raises within the block


def test_an_engine_that_tensorrt_does_not_take_is_discarded_and_replaced(tmp_path: Path) -> None:
    build(tmp_path)
    with engine_folder(tmp_path, KEY, say=nobody_is_told) as folder:
        assert folder.ready
        assert folder.path is not None
        folder.discard()
        assert not folder.ready
        assert os.listdir(folder.path) == []
        (folder.path / "new.engine").write_bytes(b"new")
    assert is_ready(tmp_path) == (True, [])
    assert sorted(os.listdir(folder.path)) == [MANIFEST, "new.engine"]


def test_files_that_a_session_rewrote_are_published_anew(tmp_path: Path) -> None:
    path = build(tmp_path)
    first = published_engines(tmp_path)[path.name]
    with engine_folder(tmp_path, KEY, say=nobody_is_told):
        pass
    second = published_engines(tmp_path)[path.name]
    assert second[0] == first[0]  # the same engine
    assert second[1] > first[1]  # used again
    with engine_folder(tmp_path, KEY, say=nobody_is_told):
        (path / "a.engine").write_bytes(b"rebuilt")
    assert published_engines(tmp_path)[path.name][0] > first[0]
    assert is_ready(tmp_path) == (True, [])


def test_a_session_without_an_engine_publishes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with engine_folder(tmp_path, KEY, say=said.append) as folder:
        assert folder.path is not None
        (folder.path / "cc87.timing").write_bytes(b"timing")
    assert len(said) == 1
    assert "the engine is not kept: ONNX Runtime wrote none" in said[0]
    assert published_engines(tmp_path) == {}


def test_a_cache_removed_while_it_is_in_use_harms_no_session(tmp_path: Path) -> None:
    said: list[str] = []
    with engine_folder(tmp_path, KEY, say=said.append) as folder:
        assert folder.path is not None
        folder.path.rmdir()
        folder.discard()
        assert folder.path.is_dir()
        folder.path.rmdir()
    assert "the engine is not kept: No such file or directory" in said[0]
    build(tmp_path)


@pytest.mark.parametrize(
    ("root", "key", "words"),
    [
        (Path("/sys/engines"), KEY, "/sys/engines: "),  # cannot be made there, by root neither
        (None, KEY, "no home folder"),
        (Path("unused"), replace(KEY, tensorrt="", driver=""), "not known on this machine: driver, tensorrt"),
    ],
    ids=["unwritable", "homeless", "unknown"],
)
def test_where_none_can_be_kept_the_session_still_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path | None, key: EngineKey, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    with engine_folder(root, key, say=said.append) as folder:
        assert (folder.path, folder.ready) == (None, False)
        folder.discard()
    assert len(said) == 1
    assert said[0].startswith(f"no engine is kept, it is built at every start: {words}")
    assert not Path("unused").exists()


def test_the_folder_is_below_the_users_cache(tmp_path: Path) -> None:
    assert default_engine_root() == tmp_path / "xdg-cache/siamese-toolkit/engines"


BUILDER = """
import sys, time
from pathlib import Path
from siamese_deploy.engine_cache import engine_folder
from siamese_deploy.tensorrt import EngineKey
key = EngineKey(*{values!r})
with engine_folder(Path({root!r}), key, say=lambda line: print("said", line, flush=True)) as folder:
    print("ready" if folder.ready else "building", flush=True)
    if not folder.ready:
        (folder.path / "a.engine").write_bytes(b"engine" * 1000)
    print("written", flush=True)
    time.sleep({seconds})
"""


def start_builder(root: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that builds KEY for so long; returned when it holds the folder."""
    values = tuple(getattr(KEY, field.name) for field in fields(KEY))
    code = BUILDER.format(values=values, root=str(root), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "written":
        assert process.poll() is None
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    end(start_builder(tmp_path, 60))
    assert (tmp_path / KEY.folder_name() / "a.engine").exists()
    assert published_engines(tmp_path) == {}
    ready, said = is_ready(tmp_path)
    assert not ready
    assert "its build did not end; not used" in said[0]
    build(tmp_path)


def test_the_second_waits_for_the_first_and_finds_its_engine(tmp_path: Path) -> None:
    first = start_builder(tmp_path, 1)
    ready, said = is_ready(tmp_path)
    assert ready
    assert len(said) == 1
    assert "another process builds this engine; waiting at most 1800 s" in said[0]
    end(first)


def test_who_waits_too_long_is_told_that_it_is_busy(tmp_path: Path) -> None:
    first = start_builder(tmp_path, 60)
    start = time.monotonic()
    with (
        pytest.raises(BusyError, match="another process builds this engine, also after 0 s"),
        engine_folder(tmp_path, KEY, wait_s=0.2, say=nobody_is_told),
    ):
        pytest.fail("opened")
    assert 0.2 <= time.monotonic() - start < 5
    assert is_ready(tmp_path, replace(KEY, precision="fp32")) == (False, [])  # another key waits for nobody
    end(first)


def used(root: Path, key: EngineKey, seconds_ago: float) -> str:
    path = build(root, key)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path.name


def test_pruning_keeps_the_most_recently_used_and_those_it_is_told(tmp_path: Path) -> None:
    keys = [replace(KEY, driver=str(n)) for n in range(1, 5)]
    names = [used(tmp_path, key, seconds_ago=n) for n, key in enumerate(keys, 1)]
    (tmp_path / "notes").mkdir()
    assert prune_engines(tmp_path, ()) == []
    assert prune_engines(tmp_path, [keys[3]], most=3) == [names[2]]
    assert sorted(published_engines(tmp_path)) == sorted([names[0], names[1], names[3]])
    size = sum(file.stat().st_size for file in (tmp_path / names[0]).iterdir())
    assert prune_engines(tmp_path, (), most_bytes=2 * size + 10) == [names[3]]
    assert prune_engines(tmp_path, keys, most=0, most_bytes=0) == []
    assert prune_engines(tmp_path, (), most=0) == names[:2]
    assert (tmp_path / "notes").exists()
    assert prune_engines(tmp_path / "absent", ()) == []
    assert not (tmp_path / "absent").exists()


def test_pruning_removes_what_killed_runs_left_but_no_entry_that_is_held(tmp_path: Path) -> None:
    builder = start_builder(tmp_path, 60)
    name = KEY.folder_name()
    aside = tmp_path / f"{name}.0123456789abcdef.old"
    aside.mkdir()
    (aside / "a.engine").write_bytes(b"half removed")
    assert prune_engines(tmp_path, (), most=0, most_bytes=0) == []
    assert (tmp_path / name / "a.engine").exists()
    assert not aside.exists()
    end(builder)
    assert prune_engines(tmp_path, ()) == [name]


def test_the_manifest_says_what_it_is_for(tmp_path: Path) -> None:
    manifest = json.loads((build(tmp_path) / MANIFEST).read_bytes())
    assert manifest["key"] == {**KEY.__dict__, "batch": [1, 8, 32], "options_version": 1}
    assert {name: record["bytes"] for name, record in manifest["files"].items()} == {
        name: len(data) for name, data in FILES.items()
    }
