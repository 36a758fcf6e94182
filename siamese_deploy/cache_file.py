"""The SQLite file behind `EmbeddingCache`: opened, checked to be ours, read, written, kept small, removed.

SQLite's errors leave here as this package's: locked -> BusyError, damaged or foreign -> IntegrityError, anything else
(disk full, read-only, ...) -> EnvironmentFault. All paths are absolute.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from siamese_deploy.errors import BusyError, EnvironmentFault, IntegrityError, SiameseError
from siamese_deploy.private_folder import user_cache_folder

FILE_NAME = "embeddings.sqlite3"
APPLICATION_ID = 0x53694543  # "SiEC", in the header of the file
FORMAT = 1
PATIENCE_S = 5.0
"""How long to wait for another process's lock."""

_KEYS_IN_SELECT = 500  # old SQLite takes 999 variables
# What changes at every hit lies apart from the vectors: a few bytes to write instead of the vectors' pages.
_SCHEMA = (
    "CREATE TABLE embeddings (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, checksum BLOB NOT NULL,"
    " vector BLOB NOT NULL)",
    "CREATE TABLE usage (id INTEGER PRIMARY KEY, used INTEGER NOT NULL)",
    "CREATE TABLE clock (tick INTEGER NOT NULL)",
    "INSERT INTO clock VALUES (0)",
    f"PRAGMA user_version={FORMAT}",
    f"PRAGMA application_id={APPLICATION_ID}",
)

# A fork waits until no thread is inside SQLite: the child would take over the record of locks that it does not hold.
_one_operation = threading.RLock()
os.register_at_fork(
    before=_one_operation.acquire, after_in_parent=_one_operation.release, after_in_child=_one_operation.release
)


class Row(NamedTuple):
    id: int
    key: bytes
    checksum: bytes
    vector: bytes

    def is_sound(self, n_bytes: int) -> bool:
        """Whether it is as it was written: a vector of `n_bytes` bytes that belongs to this key."""
        # SQLite keeps a type with every value: damage, or a hand, may have made it a number.
        if not all(isinstance(value, bytes) for value in (self.key, self.checksum, self.vector)):
            return False
        return len(self.vector) == n_bytes and _checksum(self.key, self.vector) == self.checksum


def _checksum(key: bytes, vector: bytes) -> bytes:
    return blake2b(vector, key=key, digest_size=16).digest()


def default_cache_folder() -> Path | None:
    """Where embeddings are cached unless a folder is named; None where the user has no home."""
    folder = user_cache_folder()
    return folder and Path(os.path.abspath(folder), "embeddings")


@contextmanager
def opened(path: Path, patience_s: float) -> Iterator[sqlite3.Connection]:
    """A connection for one operation, so that none is ever carried over a fork; outside a transaction. The file is
    made if it is missing, and checked to be ours."""
    with _one_operation:
        try:
            _make_file(path)
            if _regular_file(path).st_nlink != 1:
                raise IntegrityError(
                    f"{path}: has a second name (hard link), which breaks its locking; remove one", code="hard-link"
                )
            with closing(_connect(path, patience_s)) as connection:
                _check_or_make_schema(connection, path)
                # Never the write-ahead log: SQLite before 3.51.3 can damage a file in that mode, the mode is kept in
                # the file, and the next process may bring an older SQLite than this one.
                connection.execute("PRAGMA journal_mode=DELETE").fetchall()
                connection.execute("PRAGMA synchronous=NORMAL")
                yield connection
        except sqlite3.Error as error:
            raise _translated(error, path) from error


def one(connection: sqlite3.Connection, statement: str) -> Any:
    """The only value that `statement` gives."""
    try:
        return connection.execute(statement).fetchone()[0]
    except UnicodeDecodeError as error:  # SQLite quotes a damaged schema in its message
        raise sqlite3.DatabaseError("its schema is damaged") from error


def select(connection: sqlite3.Connection, keys: Sequence[bytes]) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(keys), _KEYS_IN_SELECT):
        chunk = keys[start : start + _KEYS_IN_SELECT]
        statement = f"SELECT id, key, checksum, vector FROM embeddings WHERE key IN ({','.join('?' * len(chunk))})"  # noqa: S608
        rows += map(Row._make, connection.execute(statement, chunk))
    return rows


def note_use(connection: sqlite3.Connection, used: Collection[int], damaged: Collection[int]) -> None:
    """Mark the records with the ids `used` as just used, remove those that are damaged; skipped where that cannot be
    done at once (locked, read-only, disk full): a hit is one all the same."""
    if not used and not damaged:
        return
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA busy_timeout=0")
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("UPDATE usage SET used = (SELECT tick FROM clock) WHERE id = ?", [(i,) for i in used])
        for table in ("embeddings", "usage"):
            connection.executemany(f"DELETE FROM {table} WHERE id = ?", [(i,) for i in damaged])  # noqa: S608
        connection.execute("COMMIT")


def insert(connection: sqlite3.Connection, rows: Sequence[tuple[bytes, bytes]]) -> None:
    """Write (key, vector) records; one that is there, perhaps damaged, is replaced."""
    connection.executemany(
        "INSERT INTO embeddings (key, checksum, vector) VALUES (?, ?, ?)"
        " ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, vector = excluded.vector",
        [(key, _checksum(key, vector), vector) for key, vector in rows],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO usage SELECT id, (SELECT tick FROM clock) FROM embeddings WHERE key = ?",
        [(key,) for key, _ in rows],
    )
    # Order of use is counted in writes and not in seconds: a wall clock jumps. Hits between two writes are equally
    # recent, so that a second run of nothing but hits changes, and writes, nothing.
    connection.execute("UPDATE clock SET tick = tick + 1")


def evict(connection: sqlite3.Connection, max_bytes: int, goal_bytes: int) -> int:
    """If the file is larger than `max_bytes`: drop the least recently used records until the others take `goal_bytes`.

    Returns:
        Number of records dropped.
    """
    page_bytes = one(connection, "PRAGMA page_size")
    dropped = 0
    if one(connection, "PRAGMA page_count") * page_bytes <= max_bytes:
        return 0
    while records := one(connection, "SELECT count(*) FROM usage"):
        pages = one(connection, "PRAGMA page_count") - one(connection, "PRAGMA freelist_count")
        excess = 1 - goal_bytes / (pages * page_bytes)
        if excess <= 0:
            break
        number = ceil(records * excess)
        oldest = "SELECT id FROM usage ORDER BY used, id LIMIT ?"
        connection.execute(f"DELETE FROM embeddings WHERE id IN ({oldest})", (number,))  # noqa: S608
        if not connection.execute(f"DELETE FROM usage WHERE id IN ({oldest})", (number,)).rowcount:  # noqa: S608
            raise sqlite3.DatabaseError("records that cannot be removed")
        dropped += number
    return dropped


def shrink_file(connection: sqlite3.Connection, max_bytes: int) -> None:
    """Give free pages beyond `max_bytes` back to the disk; outside a transaction."""
    pages = one(connection, "PRAGMA page_count") - max_bytes // one(connection, "PRAGMA page_size")
    if pages > 0:
        # execute() would give back one page: it takes a statement without columns to end at its first step.
        connection.executescript(f"PRAGMA incremental_vacuum({pages})")


def remove_cache_file(path: Path) -> int | None:
    """Remove the file and its journal, damaged ones too; nothing that may be somebody else's.

    Returns:
        Size of the file in bytes; None if there was none.

    Raises:
        IntegrityError: what is there may be somebody else's.
        BusyError: another process has kept it locked.
        EnvironmentFault: it cannot be opened for writing.
    """
    if not os.path.lexists(path):
        return None
    file_bytes = _regular_file(path).st_size
    with _one_operation:
        try:
            with closing(_connect(path, PATIENCE_S)) as connection:
                # Held while the file goes, so that no other process is in the middle of writing it.
                connection.execute("BEGIN EXCLUSIVE")
                if not _is_empty(connection) and one(connection, "PRAGMA application_id") != APPLICATION_ID:
                    raise _foreign(path)
                _unlink(path)
        except sqlite3.Error as error:
            reason = _translated(error, path)
            if not isinstance(reason, IntegrityError):
                raise reason from error
            if not _looks_like_ours(path):
                raise IntegrityError(
                    f"{path}: this may be no embedding cache; remove it yourself", code="not-ours"
                ) from error
            _unlink(path)
    return file_bytes


def _looks_like_ours(path: Path) -> bool:
    """Of a file that SQLite cannot read."""
    with open(path, "rb") as file:
        header = file.read(100)
    if header.startswith(b"SQLite format 3\0"):
        return int.from_bytes(header[68:72], "big") == APPLICATION_ID
    return path.parent == default_cache_folder()


def _unlink(path: Path) -> None:
    # The file itself last: a journal that outlives it might be played into the next one.
    for suffix in ("-journal", "-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _regular_file(path: Path) -> os.stat_result:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{path}: not a regular file; remove it or choose another folder")
    return status


def _make_file(path: Path) -> None:
    if os.path.lexists(path):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)  # whatever the user's mask; SQLite gives its journal the same
    os.close(descriptor)


def _connect(path: Path, patience_s: float) -> sqlite3.Connection:
    address = f"file://{quote(os.fsencode(path))}?mode=rw"  # a name is bytes, and need not be UTF-8
    connection = sqlite3.connect(address, uri=True, timeout=patience_s, isolation_level=None)
    connection.text_factory = bytes  # damaged text is no reason for a UnicodeDecodeError
    return connection


def _check_or_make_schema(connection: sqlite3.Connection, path: Path) -> None:
    if _is_empty(connection):
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("BEGIN IMMEDIATE")
        if _is_empty(connection):  # still: another process may have been quicker
            for statement in _SCHEMA:
                connection.execute(statement)
        connection.execute("COMMIT")
    if one(connection, "PRAGMA application_id") != APPLICATION_ID:
        raise _foreign(path)
    version = one(connection, "PRAGMA user_version")
    if version != FORMAT:
        raise IntegrityError(
            f"{path}: format {version}, expected {FORMAT}: another version of this toolkit made it; choose another "
            f"folder or run: {_clear_command(path)}",
            code="other-version",
        )
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY sql").fetchall()
    if found != sorted((statement.encode(),) for statement in _SCHEMA if statement.startswith("CREATE")):
        raise sqlite3.DatabaseError("its schema is not what it was made with")


def _is_empty(connection: sqlite3.Connection) -> bool:
    tables = one(connection, "SELECT count(*) FROM sqlite_master")
    return (tables, one(connection, "PRAGMA application_id"), one(connection, "PRAGMA user_version")) == (0, 0, 0)


def _foreign(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path}: another application's database, not an embedding cache; choose another folder", code="not-ours"
    )


def _translated(error: sqlite3.Error, path: Path) -> SiameseError:
    if "locked" in str(error):
        return BusyError(f"{path}: another process keeps it locked; try again")
    if not isinstance(error, sqlite3.OperationalError) or "no such" in str(error):
        return IntegrityError(f"{path}: damaged, or no embedding cache ({error}); run: {_clear_command(path)}")
    return EnvironmentFault(f"{path}: {error}; choose another folder with --cache DIR, or --no_cache")


def _clear_command(path: Path) -> str:
    named = path.parent != default_cache_folder()
    return "siamese cache clear" + (f" --cache {shlex.quote(str(path.parent))}" if named else "")
