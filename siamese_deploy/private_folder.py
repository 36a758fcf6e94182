"""Folders whose files are believed (embeddings, engines, galleries): nobody else may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from siamese_deploy.durable_files import make_folder
from siamese_deploy.errors import EnvironmentFault, UsageError


def private_folder(path: Path) -> Path:
    """Make the folder with mode 0700 if it is missing, and check it.

    Raises:
        UsageError: `path` or one of its parents is a file.
        EnvironmentFault: it belongs to somebody else, or others may write into it.
    """
    try:
        make_folder(path, 0o700)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path}: it or one of its parents is a file; expected a folder") from error
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise EnvironmentFault(
            f"{path}: belongs to user {status.st_uid}, expected {os.geteuid()}; choose another folder",
            code="unsafe-folder",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EnvironmentFault(f"{path}: others may write into it; run: chmod go-w {path}", code="unsafe-folder")
    return path


def user_cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/siamese-toolkit, or ~/.cache/siamese-toolkit; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the specification of these folders says to ignore relative ones
        return Path(base) / "siamese-toolkit"
    home = os.path.expanduser("~")
    return Path(home) / ".cache/siamese-toolkit" if os.path.isabs(home) else None
