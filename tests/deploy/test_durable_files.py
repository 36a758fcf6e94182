from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from siamese_deploy.durable_files import folder_published_as, locked_folder, write_atomically
from siamese_deploy.errors import BusyError, EnvironmentFault, UsageError


def replace(_: Path) -> None:
    """Whatever is there."""


def fail_half_way(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail_half_way)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept"]


def test_written_files_have_the_permissions_of_the_users_mask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b""))
        with folder_published_as(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with folder_published_as(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
    assert os.listdir(target) == ["a"]
    with pytest.raises(KeyboardInterrupt), folder_published_as(tmp_path / "other"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["target"]


def test_one_process_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from siamese_deploy.durable_files import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    with locked_folder(tmp_path / "new"):
        assert "BusyError" in subprocess.run(command, capture_output=True, text=True).stderr
        with pytest.raises(BusyError), locked_folder(tmp_path / "new"):
            pass
    assert subprocess.run(command).returncode == 0


def test_a_file_is_no_folder_to_lock(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"), locked_folder(tmp_path / "file"):
        pass


def test_a_folder_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(UsageError, match="exists already"), folder_published_as(target):
        pass
    with folder_published_as(target, replace) as temporary:
        (temporary / "new").write_text("new")
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    with pytest.raises(OSError, match="No space"), folder_published_as(target, replace):
        raise OSError(28, "No space left on device")
    assert (os.listdir(target), os.listdir(tmp_path)) == (["new"], ["target"])
    # What is there is looked at again after the new folder is complete.
    calls = []

    def refuse_the_second_time(path: Path) -> None:
        calls.append(path)
        if (path / "mine").exists():
            raise UsageError("somebody's files")

    with pytest.raises(UsageError, match="somebody's"), folder_published_as(target, refuse_the_second_time):
        (target / "mine").write_text("")
    assert sorted(os.listdir(target)) == ["mine", "new"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, None])
def test_replacing_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    class OldLibc:
        def __init__(self, *_: object, **__: object) -> None:
            if number is not None:
                self.renameat2 = lambda *_: -1

    monkeypatch.setattr("ctypes.CDLL", OldLibc)
    monkeypatch.setattr("ctypes.get_errno", lambda: number)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with folder_published_as(target, replace) as temporary:
        (temporary / "new").write_text("new")
    assert (os.listdir(target), os.listdir(tmp_path)) == (["new"], ["target"])

    rename = os.rename

    def fail_to_publish(source: Path, destination: Path) -> None:
        if destination == target and not str(source).endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr("os.rename", fail_to_publish)
    with pytest.raises(OSError, match="Input/output"), folder_published_as(target, replace):
        pass
    assert (os.listdir(target), os.listdir(tmp_path)) == (["new"], ["target"])


def test_an_error_of_the_exchange_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        renameat2 = staticmethod(lambda *_: -1)

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: FullDisk)
    monkeypatch.setattr("ctypes.get_errno", lambda: errno.ENOSPC)
    (tmp_path / "target").mkdir()
    (tmp_path / "target/old").write_text("old")
    with pytest.raises(OSError, match="No space"), folder_published_as(tmp_path / "target", replace):
        pass
    assert (os.listdir(tmp_path / "target"), os.listdir(tmp_path)) == (["old"], ["target"])


def test_what_killed_runs_left_is_removed_and_what_runs_is_not(tmp_path: Path) -> None:
    target = tmp_path / "target"
    hour_ago = time.time() - 3600
    names = [".target.aaaaaaaa.tmp", ".target.bbbbbbbb.tmp", ".other.cccccccc.tmp", ".target.young___.tmp"]
    for name in [*names, ".target.backup.tmp", ".target.v2.dddddddd.tmp"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
        if "young" not in name:
            os.utime(tmp_path / name, (hour_ago, hour_ago))
    (tmp_path / ".target.link____.tmp").symlink_to(tmp_path / names[2])
    with locked_folder(tmp_path / names[1]), folder_published_as(target):
        pass
    left = {*names[1:], ".target.link____.tmp", ".target.backup.tmp", ".target.v2.dddddddd.tmp", "target"}
    assert set(os.listdir(tmp_path)) == left
    assert os.listdir(tmp_path / names[2]) == ["half"]


def test_what_a_killed_run_moved_aside_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".target.aaaaaaaa.tmp.old").mkdir()
    (tmp_path / ".target.aaaaaaaa.tmp.old/old").write_text("old")
    with pytest.raises(UsageError, match="exists already"), folder_published_as(target):
        pass
    assert (os.listdir(tmp_path), os.listdir(target)) == (["target"], ["old"])


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY])
def test_a_place_that_takes_no_folder_is_the_environments_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def busy(*_: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.rename", busy)
    with pytest.raises(EnvironmentFault, match="cannot be put there"), folder_published_as(tmp_path / "target"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_writing_is_not_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siamese_deploy.durable_files._ABANDONED_AFTER_S", -1)
    with folder_published_as(tmp_path / "target") as first:
        with folder_published_as(tmp_path / "target", replace) as second:
            assert first.exists()
            (second / "second").write_text("")
        assert first.exists()
        os.rename(tmp_path / "target", tmp_path / "aside")
    assert sorted(os.listdir(tmp_path)) == ["aside", "target"]
