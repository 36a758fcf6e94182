from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from siamese_deploy.durable_files import folder_published_as, locked_folder, write_atomically
from siamese_deploy.errors import BusyError, UsageError


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
