"""Nothing appears under its final name before it is complete and on the disk; one writer a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from siamese_deploy.errors import BusyError, UsageError


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it, and rename it to `path`.

    On any error, the interrupt key included, the file that was there before is untouched and the temporary one gone.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from the user's group
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def folder_published_as(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`; it becomes `target` when the block ends well.

    Raises:
        UsageError: `target` exists, or its parent folder does not.
    """
    refuse_existing(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        refuse_existing(target)  # again: os.rename would replace an empty folder, and fail obscurely on others
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target.parent)


def refuse_existing(target: Path) -> None:
    """Raises:
    UsageError: `target` exists (if only as a broken link), or its parent folder does not.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; choose another folder or remove it first")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: its parent folder does not exist; make it first")


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the folder if it is missing and hold it alone; the lock is the kernel's and ends with the process.

    Raises:
        UsageError: `path` or one of its parents is a file.
        BusyError: another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path}: it or one of its parents is a file; expected a folder to write into") from error
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{path}: another run writes into this folder; wait or choose another") from error
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    # The only way to read the mask is to set it; reading it from /proc would tie this to Linux.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
