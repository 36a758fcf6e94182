from __future__ import annotations

import os
from pathlib import Path

import pytest

from siamese_deploy.errors import EnvironmentFault, UsageError
from siamese_deploy.private_folder import private_folder, user_cache_folder


def test_made_for_the_owner_alone_whatever_the_mask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        folder = private_folder(tmp_path / "deep/cache")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(EnvironmentFault, match="others may write"):
        private_folder(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, -1)
    with pytest.raises(EnvironmentFault, match="belongs to user 12345"):
        private_folder(tmp_path / "cache")


def test_a_file_in_the_way_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/cache"):
        with pytest.raises(UsageError, match="is a file"):
            private_folder(path)


def test_where_the_users_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert user_cache_folder() == Path("/xdg/siamese-toolkit")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_cache_folder() == Path("/home/somebody/.cache/siamese-toolkit")
