"""Nothing appears under its final name before it is complete and on the disk; one writer a folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from siamese_deploy.errors import BusyError, EnvironmentFault, UsageError

_TEMPORARY, _ASIDE = ".tmp", ".old"
_ABANDONED_AFTER_S = 60
# Of Linux's renameat2(2).
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make the folder and its missing parents, if it is missing; a power cut then takes none of them away.

    Raises:
        FileExistsError, NotADirectoryError: `path` or one of its parents is a file.
    """
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            fsync_path(parent.parent)
    is_new = not path.exists()
    path.mkdir(mode, exist_ok=True)
    if is_new:
        fsync_path(path.parent)


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
def folder_published_as(target: Path, refuse: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary folder beside `target`; it becomes `target` when the block ends well.

    Args:
        refuse: raises if what is at `target` must not be replaced; default: `refuse_existing`. A folder that it lets
            pass stays until it is exchanged for the new one in a single step.

    Raises:
        UsageError: as `refuse` says.
        EnvironmentFault: a folder cannot be put there.
    """
    target = Path(os.path.abspath(target))
    refuse = refuse or refuse_existing
    refuse(target)
    _remove_abandoned(target)
    refuse(target)  # a killed run may have left it aside
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_TEMPORARY, dir=target.parent))
    lock = -1
    try:
        lock = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks; then no other run gets one either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        refuse(target)  # again: os.rename would replace an empty folder, and somebody may have put his files there
        try:
            if target.exists():
                _exchange(temporary, target)
            else:
                os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EINVAL, errno.ENOTEMPTY):
                raise
            raise EnvironmentFault(
                f"{target}: the complete folder cannot be put there ({error.strerror}); choose a place that is no "
                "mount point and that nothing else writes to"
            ) from error
        fsync_path(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half of the new folder, or the whole of the old one
        if lock >= 0:
            os.close(lock)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders of one parent, so that neither name is ever without a folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
            raise OSError(number, os.strerror(number), str(other))
    # A system or file system without the call: for a moment `other` is missing. Who comes next puts it back.
    aside = one.with_name(one.name + _ASIDE)
    try:
        os.rename(other, aside)
        os.rename(one, other)
    except BaseException:
        if aside.exists() and not other.exists():
            os.rename(aside, other)
        raise
    fsync_path(other.parent)  # a power cut must not find this last renaming done and not the one before
    os.rename(aside, one)


def _remove_abandoned(target: Path) -> None:
    """Temporary folders of runs that were killed: nobody holds their lock any more."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(_TEMPORARY)}({re.escape(_ASIDE)})?")
    for name in os.listdir(target.parent):
        found = pattern.fullmatch(name)
        folder = target.with_name(name)
        if found and found[1] and not target.exists():
            os.rename(folder, target)
        if not found:
            continue
        try:
            # Between its making and its locking a folder is young.
            if time.time() - folder.stat().st_mtime < _ABANDONED_AFTER_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def refuse_existing(target: Path) -> None:
    """Raises:
    UsageError: `target` exists (if only as a broken link), or its parent folder does not.
    """
    if os.path.lexists(target):
        raise UsageError(f"{target}: exists already; choose another folder or remove it first", code="output-exists")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: its parent folder does not exist; make it first", code="not-found")


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the folder if it is missing and hold it alone; the lock is the kernel's and ends with the process.

    Raises:
        UsageError: `path` or one of its parents is a file, or it is the root of the file system or the home folder.
        EnvironmentFault: no folder can be made there.
        BusyError: another process holds it.
    """
    home = os.path.expanduser("~")
    if os.path.realpath(path) in ("/", os.path.realpath(home) if os.path.isabs(home) else "/"):
        raise UsageError(f"{path}: is {os.path.realpath(path)}, where no results belong; choose a folder in it")
    try:
        make_folder(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path}: it or one of its parents is a file; expected a folder to write into") from error
    except FileNotFoundError as error:  # in /proc and the like
        raise EnvironmentFault(f"{path}: no folder can be made there; choose another place") from error
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
