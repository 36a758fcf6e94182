"""What the harnesses must notice: guards taken out of the code, in the process that is to run without them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from siamese_deploy import durable_files, engine_cache, result_folder
from siamese_deploy.gallery import store, vectors


def _fsync_of(kind: Callable[[int], bool]) -> None:
    """No fsync of what is of this kind any more."""
    real = os.fsync
    os.fsync = lambda fd: None if kind(os.fstat(fd).st_mode) else real(fd)  # type: ignore[assignment,arg-type]


def _written_in_place(path: Path, write: Callable[[Any], object]) -> None:
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _write_in_place() -> None:
    from crash import protocols

    for module in (durable_files, engine_cache, result_folder, protocols):
        module.write_atomically = _written_in_place  # type: ignore[attr-defined]


def _no_transaction() -> None:
    @contextlib.contextmanager
    def writing(self: Any) -> Any:
        with self._connected() as database:
            self._tidy(database)
            yield database
            database.execute("UPDATE change SET number = random()")

    store.GalleryStore._writing = writing  # type: ignore[method-assign,assignment]


def _lazy_sqlite() -> None:
    """synchronous = OFF, whatever the code asks for."""
    real = sqlite3.connect

    class Lazy(sqlite3.Connection):
        def executescript(self, text: str) -> Any:
            return super().executescript(text + "; PRAGMA synchronous = OFF")

    def connect(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, factory=Lazy, **options)

    sqlite3.connect = connect  # type: ignore[assignment]


def _folder_left_to_sqlite() -> None:
    """SQLite takes a folder that it cannot open for one that is synced."""
    store.fsync_path = lambda path: None  # type: ignore[assignment]


def _vectors_after_the_commit() -> None:
    """Rows are committed first and their vectors written next."""
    real, waiting = vectors.write_slots, []
    store.write_slots = lambda *arguments: waiting.append(arguments)  # type: ignore[assignment]
    enrol = store.GalleryStore.enrol

    def enrolled(self: Any, *arguments: Any, **options: Any) -> Any:
        outcome = enrol(self, *arguments, **options)
        time.sleep(0.01)  # for kills to meet it
        for call in waiting:
            real(*call)
        waiting.clear()
        return outcome

    store.GalleryStore.enrol = enrolled  # type: ignore[method-assign]


def _swallowed() -> None:
    """An error of the disk is taken for success."""
    real = durable_files.write_atomically

    def write(path: Path, content: Callable[[Any], object]) -> None:
        with contextlib.suppress(OSError):
            real(path, content)

    from crash import protocols

    protocols.write_atomically = write


_SABOTAGE: dict[str, Callable[[], object]] = {
    "": lambda: None,
    "no sync of any kind": lambda: None,  # the shim's work, as SQLite's syncs are out of Python's reach
    "no sync of files": lambda: _fsync_of(stat.S_ISREG),
    "no sync of folders": lambda: _fsync_of(stat.S_ISDIR),
    "written in place": _write_in_place,
    "no transaction": _no_transaction,
    "lazy SQLite": _lazy_sqlite,
    "folder left to SQLite": _folder_left_to_sqlite,
    "vectors after the commit": _vectors_after_the_commit,
    "errors swallowed": _swallowed,
}


def apply(name: str) -> None:
    _SABOTAGE[name]()


def take_exchange_away() -> None:
    class OldLibrary:
        def __init__(self, *_: object, **__: object) -> None:
            """A C library without renameat2."""

    mock.patch.object(durable_files.ctypes, "CDLL", OldLibrary).start()
