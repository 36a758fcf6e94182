"""TensorRT engines on disk: one folder for everything an engine depends on, believed only when its hashes agree.

An engine is code that runs on the GPU, and TensorRT's own checks do not tell a changed one. So the folders belong to
the user alone, and each has a manifest with the key and the SHA-256 of every file. The manifest is written last: a
build that was killed leaves none, and a folder without one is removed before the next build.

    root/backbone-<digest of the key>/       *.engine, *.profile, *.timing (by ONNX Runtime), manifest.json (by us)
    root/backbone-<digest of the key>.lock   held by who builds or opens
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from siamese_deploy.durable_files import fsync_path, write_atomically
from siamese_deploy.errors import BusyError
from siamese_deploy.private_folder import private_folder, user_cache_folder
from siamese_deploy.tensorrt import GRAPHS, EngineKey

FORMAT = "siamese-engine/1"
MANIFEST = "manifest.json"
WAIT_S = 1800.0
MOST_ENGINES, MOST_BYTES = 16, 4 * 2**30

_MAX_MANIFEST_BYTES = 2**20
_POLL_S, _SAY_AFTER_S = 0.1, 0.5
_ENTRY = re.compile(rf"(?:{'|'.join(GRAPHS)})-[0-9a-f]{{32}}(\.[0-9a-f]{{16}}\.old)?")
# Where engines cannot be kept, TensorRT works all the same: it only builds at every start.
_CANNOT_KEEP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EOPNOTSUPP}


@dataclass
class EngineFolder:
    path: Path | None
    """Where ONNX Runtime writes and looks for the engine; None where none can be kept."""
    ready: bool
    """A verified engine is there."""

    def discard(self) -> None:
        """Empty the folder: for an engine whose bytes are right, but which TensorRT does not take."""
        if self.path is not None:
            _remove(self.path)
            self.path.mkdir(mode=0o700)
        self.ready = False


@contextmanager
def engine_folder(
    root: Path | None, key: EngineKey, *, wait_s: float = WAIT_S, say: Callable[[str], None]
) -> Iterator[EngineFolder]:
    """The folder to open the session with, held alone within the block; published when the block ends well.

    Args:
        root: as `default_engine_root`.
        wait_s: how long to wait for another process that builds the same engine.
        say: gets a line for whatever a person should know: an entry that is not used, a wait, an engine not kept.

    Raises:
        BusyError: another process still builds after `wait_s`.
        UsageError: `root` or one of its parents is a file.
        EnvironmentFault: `root` belongs to somebody else, or others may write into it.
    """
    with ExitStack() as held:
        path, ready, obstacle = None, False, _unknown(root, key)
        if root is not None and not obstacle:
            try:
                entry = private_folder(root) / key.folder_name()
                held.callback(os.close, _wait_for_lock(entry, wait_s, say))
                ready = _ready_or_emptied(entry, key, say)
                path = entry
            except OSError as error:
                if error.errno not in _CANNOT_KEEP:
                    raise
                obstacle = f"{error.filename or root}: {error.strerror}"
        if path is None:
            say(f"no engine is kept, it is built at every start: {obstacle}")
            yield EngineFolder(None, ready=False)
            return
        folder = EngineFolder(path, ready)
        try:
            yield folder
        except BaseException:
            if not folder.ready:
                with suppress(OSError):
                    _remove(path)
            raise
        _publish(path, key, say)


def default_engine_root() -> Path | None:
    """None where there is no home."""
    cache = user_cache_folder()
    return cache / "engines" if cache else None


def published_engines(root: Path) -> dict[str, tuple[int, int]]:
    """Folder name -> when its engine was built and when it was last used, as st_mtime_ns; unverified."""
    published = {}
    for path in _entries(root):
        try:
            published[path.name] = ((path / MANIFEST).lstat().st_mtime_ns, path.lstat().st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return published


def prune_engines(
    root: Path, keep: Collection[EngineKey], *, most: int = MOST_ENGINES, most_bytes: int = MOST_BYTES
) -> list[str]:
    """Remove the engines that were not used for longest, and what killed builds left; never one that is locked.

    Args:
        keep: never removed, but counted.
        most: entries that may stay.
        most_bytes: that all of them together may take.

    Returns:
        Names of the removed folders.

    Raises:
        UsageError, EnvironmentFault: as `engine_folder`.
    """
    if not root.exists():
        return []
    private_folder(root)
    names, published = {key.folder_name() for key in keep}, published_engines(root)

    def worth(path: Path) -> tuple[bool, int]:
        return path.name in names, published.get(path.name, (0, 0))[1]

    removed, count, size = [], 0, 0
    for path in sorted(_entries(root), key=worth, reverse=True):
        count, size = count + 1, size + _size_bytes(path)
        if path.name in names or (path.name in published and count <= most and size <= most_bytes):
            continue
        lock = _lock(path)
        if lock is not None:
            _remove(path)
            os.close(lock)
            removed.append(path.name)
    for path in root.iterdir():
        if (found := _ENTRY.fullmatch(path.name)) and found[1]:
            _delete(path)
    return removed


def _unknown(root: Path | None, key: EngineKey) -> str:
    names = [name for name, value in asdict(key).items() if not value]
    if names:
        return f"not known on this machine: {', '.join(names)}"
    return "" if root is not None else "no home folder"


def _entries(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if (found := _ENTRY.fullmatch(path.name)) and not found[1]]
    except FileNotFoundError:
        return []


def _size_bytes(path: Path) -> int:
    size = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # another process prunes too
            size += file.lstat().st_size
    return size


def _lock(path: Path) -> int | None:
    """Descriptor that holds the entry, or None where another process does. The empty file stays."""
    file = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)  # engines that came with a system image
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _wait_for_lock(path: Path, wait_s: float, say: Callable[[str], None]) -> int:
    start, said = time.monotonic(), False
    while (lock := _lock(path)) is None:
        waited_s = time.monotonic() - start
        if waited_s >= wait_s:
            raise BusyError(
                f"{path}: another process builds this engine, also after {wait_s:.0f} s; wait for it or end it"
            )
        if waited_s >= _SAY_AFTER_S and not said:
            said = True
            say(f"{path}: another process builds this engine; waiting at most {wait_s:.0f} s")
        time.sleep(_POLL_S)
    return lock


def _ready_or_emptied(path: Path, key: EngineKey, say: Callable[[str], None]) -> bool:
    if os.path.lexists(path):
        flaw = _flaw(path, key)
        if not flaw:
            return True
        say(f"{path}: {flaw}; not used, and built again")
        _remove(path)
    path.mkdir(mode=0o700)
    return False


def _flaw(path: Path, key: EngineKey) -> str:
    """Why the entry is not to be believed; "" if it is whole."""
    status = path.lstat()
    # A folder that nobody else can enter makes the modes of its files irrelevant.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        return "expected a folder of this user, with mode 0700"
    try:
        files = _hash_files(path)
        with open(path / MANIFEST, "rb") as file:
            manifest = json.loads(file.read(_MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return "its build did not end"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return f"damaged ({error})"
    if manifest == _manifest(key, files):
        return ""
    recorded = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(recorded, dict) or manifest != _manifest(key, recorded):
        return "its manifest is damaged or belongs to another engine"
    differing = sorted(name for name in {*files, *recorded} if files.get(name) != recorded.get(name))
    return f"changed, added or missing since it was built: {', '.join(differing)}"


def _manifest(key: EngineKey, files: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "key": key.to_json(), "files": files}


def _hash_files(path: Path) -> dict[str, Any]:
    """Name -> {bytes, sha256} of all files but the manifest.

    Raises:
        ValueError: something is no plain file of this user.
    """
    files: dict[str, Any] = {}
    for name in sorted(os.listdir(path)):
        status = (path / name).lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ValueError(f"{name} is no plain file of this user")
        if name != MANIFEST:
            digest = hashlib.sha256()
            with open(path / name, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            files[name] = {"bytes": status.st_size, "sha256": digest.hexdigest()}
    return files


def _publish(path: Path, key: EngineKey, say: Callable[[str], None]) -> None:
    """Make the entry one that the next start believes. The session is open already, so nothing here is an error."""
    try:
        files = _hash_files(path)
        if not any(name.endswith(".engine") for name in files):
            raise ValueError("ONNX Runtime wrote none")
        text = json.dumps(_manifest(key, files), indent=2, sort_keys=True).encode() + b"\n"
        manifest = path / MANIFEST
        if not manifest.exists() or manifest.read_bytes() != text:
            for name in files:
                fsync_path(path / name)
            fsync_path(path)
            write_atomically(manifest, lambda file: file.write(text))
            fsync_path(path.parent)
    except (OSError, ValueError) as error:
        say(f"{path}: the engine is not kept: {getattr(error, 'strerror', None) or error}")
        with suppress(OSError):
            _remove(path)
    with suppress(OSError):  # a read-only system image, or removed just above
        os.utime(path)  # last used now, for pruning


def _remove(path: Path) -> None:
    """Renamed first: no kill, and no file that cannot be removed, leaves half of an entry under its name."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.old")
    with suppress(FileNotFoundError):  # a user who tidies up his cache folder
        os.rename(path, aside)
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
