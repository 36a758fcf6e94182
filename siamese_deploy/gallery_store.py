"""What a gallery keeps on disk: who is enrolled in SQLite, and the embeddings in one flat file beside it.

    gallery.sqlite     identities, one row per picture (slot, SHA-256 of the picture, source, checksum), free slots
    vectors-<id>.f32   slot k is the k-th (dim,) little-endian float32 vector; slots that no row names hold nothing

A vector is written to a slot that nobody names and synced before the transaction that names it, and a slot is wiped
only after the transaction that freed it. So a kill or a power cut at any moment leaves every acknowledged row and no
half one. SQLite's rollback journal makes writers wait for readers, so no slot changes under a reader.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt

from siamese_deploy.durable_files import fsync_path
from siamese_deploy.errors import BusyError, EnvironmentFault, InputDataError, IntegrityError
from siamese_deploy.gallery_vectors import VectorFile, checksums, new_vectors_name, write_slots
from siamese_deploy.private_folder import private_folder
from siamese_deploy.verifier import Embeddings

DATABASE = "gallery.sqlite"
CHUNK_ROWS = 8192
"""Vectors in memory at a time."""
_APPLICATION_ID = 0x53474C59  # "SGLY"
_FORMAT = 1
_BUSY_S = 60.0
_SCHEMA = """
CREATE TABLE model (bundle_digest TEXT NOT NULL, dim INTEGER NOT NULL, vectors TEXT NOT NULL, seal BLOB NOT NULL);
CREATE TABLE change (number INTEGER NOT NULL);
CREATE TABLE identity (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE picture (
    slot INTEGER PRIMARY KEY,
    identity INTEGER NOT NULL REFERENCES identity (id),
    sha256 BLOB NOT NULL UNIQUE,
    source BLOB NOT NULL,
    enrolled_utc TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    seal BLOB NOT NULL
);
CREATE INDEX picture_of_identity ON picture (identity);
CREATE TABLE free_slot (slot INTEGER PRIMARY KEY, wiped INTEGER NOT NULL);
INSERT INTO change VALUES (0);
"""
_ROWS = (
    "SELECT slot, name, sha256, source, enrolled_utc, checksum, seal "
    "FROM picture LEFT JOIN identity ON identity.id = picture.identity"
)


@dataclass(frozen=True)
class StoredPicture:
    name: str
    """Of the identity."""
    sha256: bytes
    """Of the picture's bytes."""
    source: str
    """Absolute path it was enrolled from; "" if it was no file."""
    enrolled_utc: str = ""
    slot: int = -1
    damaged: bool = False
    """The record does not match its own seal."""


@dataclass(frozen=True)
class Rows:
    """All rows at one moment, by slot. About 20 bytes each, and the identities' names once."""

    change: int
    slots: npt.NDArray[np.int64]
    """(n,) ascending."""
    identities: npt.NDArray[np.int64]
    """(n,) index into `names`."""
    checksums: npt.NDArray[np.uint64]
    """(n,) of each row's vector."""
    names: tuple[str, ...]
    """Sorted."""
    damaged: int
    """Rows whose record in the database does not match its own seal; they are not among the others."""


@dataclass(frozen=True)
class Snapshot:
    rows: Rows
    vectors: VectorFile
    _database: sqlite3.Connection

    def pictures(self) -> list[StoredPicture]:
        return _pictures(self._database, None)

    def sound_vectors(
        self, wanted: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[npt.NDArray[np.int64], Embeddings]]:
        """Indices of rows, ascending, and their vectors, (n, dim) float32, a chunk of slots at a time.

        Rows that are not `wanted`, or whose vector is not the one that was stored, are left out. The next chunk may
        overwrite the vectors.
        """
        slots = self.rows.slots
        n_slots = int(slots[-1]) + 1 if len(slots) else 0
        buffer = np.empty((min(CHUNK_ROWS, n_slots), self.vectors.dim), np.float32)
        for start in range(0, n_slots, CHUNK_ROWS):
            low, high = np.searchsorted(slots, [start, start + CHUNK_ROWS])
            row = np.arange(low, high)
            if wanted is not None:
                row = row[wanted[low:high]]
            if not len(row):
                continue
            end = int(slots[row[-1]]) + 1
            chunk = buffer[: end - start]
            self.vectors.read(start, chunk)
            if len(row) < len(chunk):
                chunk = chunk[slots[row] - start]
            sound = checksums(chunk) == self.rows.checksums[row]
            if sound.all():
                yield row, chunk
            elif sound.any():
                yield row[sound], chunk[sound]


class GalleryStore:
    """One gallery folder. Safe with several threads and processes, also forked ones: nothing stays open in between.

    Raises of every method:
        IntegrityError: not a gallery, of a newer format, or damaged as a database.
        BusyError: another process held it for a minute.
        EnvironmentFault: disk full, not writable, or others may write into the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / DATABASE).exists():
            raise InputDataError(f"{folder}: is no gallery ({DATABASE} is missing); siamese gallery enrol makes one")
        self.folder = private_folder(folder)
        with self._reading() as database:
            self._model(database)

    @classmethod
    def create(cls, folder: Path, bundle_digest: str, dim: int) -> GalleryStore:
        """Make an empty gallery, or open the one that is there."""
        private_folder(folder)
        store = cls.__new__(cls)
        store.folder = folder
        with store._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
                database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                database.execute(f"PRAGMA user_version = {_FORMAT}")
                for statement in filter(None, map(str.strip, _SCHEMA.split(";"))):
                    database.execute(statement)
                store._name_model(database, bundle_digest, dim, new_vectors_name())
            database.execute("COMMIT")
        (folder / DATABASE).chmod(0o600)
        fsync_path(folder)
        return cls(folder)

    def model(self) -> tuple[str, int]:
        """Digest of the bundle that made the embeddings, and their dimension."""
        with self._reading() as database:
            return self._model(database)[:2]

    def pictures(self, name: str | None = None) -> list[StoredPicture]:
        """All rows, or those of one identity, ordered by name and slot."""
        with self._reading() as database:
            return _pictures(database, name)

    def add(self, pictures: Sequence[StoredPicture], vectors: Embeddings, *, replace: Sequence[str] = ()) -> None:
        """Add rows, all of them or none, on the disk when this returns.

        Args:
            vectors: (n, dim) float32, finite.
            replace: identities whose earlier rows go in the same moment.

        Raises:
            InputDataError: a picture is enrolled already.
            IntegrityError: a vector is not finite.
        """
        if not np.isfinite(vectors).all():
            raise IntegrityError("an embedding is not finite (NaN or infinity); nothing was enrolled")
        with self._writing() as database:
            _, dim, file = self._model(database)
            if vectors.shape != (len(pictures), dim) or vectors.dtype != np.float32:
                raise IntegrityError(f"embeddings: expected float32 ({len(pictures)}, {dim}), got {vectors.shape}")
            for name in replace:
                _free(database, name)
            slots = _free_slots(database, len(pictures))
            write_slots(self.folder / file, slots, vectors)
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            for slot, picture, checksum in zip(slots, pictures, checksums(vectors), strict=True):
                database.execute("INSERT OR IGNORE INTO identity (name) VALUES (?)", (picture.name,))
                (identity,) = database.execute("SELECT id FROM identity WHERE name = ?", (picture.name,)).fetchone()
                source, number = os.fsencode(picture.source), int(checksum.view(np.int64))
                seal = _row_seal(slot, picture.name, picture.sha256, source, when, number)
                try:
                    row = (slot, identity, picture.sha256, source, when, number, seal)
                    database.execute("INSERT INTO picture VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                except sqlite3.IntegrityError as error:
                    raise InputDataError(f"{picture.source}: this picture is enrolled already") from error
        if replace:
            self._tidy_up()

    def remove(self, names: Sequence[str]) -> int:
        """Remove identities, all of them or none; their vectors are overwritten. Returns the number of rows.

        Raises:
            InputDataError: one of them is not enrolled.
        """
        with self._writing() as database:
            removed = 0
            for name in names:
                count = _free(database, name)
                if not count:
                    raise InputDataError(f"{name}: no such identity in {self.folder}; nothing was removed")
                removed += count
        self._tidy_up()
        return removed

    def change(self) -> int:
        """A number that grows with every change."""
        with self._reading() as database:
            return _change(database)

    @contextmanager
    def snapshot(self, known: Rows | None = None) -> Iterator[Snapshot]:
        """Rows and vectors as they are now, and as they stay until the block ends; writers wait.

        `known` are rows of an earlier snapshot, given again if nothing has changed.
        """
        with self._reading() as database:
            _, dim, file = self._model(database)
            change = _change(database)
            rows = known if known is not None and known.change == change else _read_rows(database, change)
            with VectorFile(self.folder / file, dim) as vectors:
                yield Snapshot(rows, vectors, database)

    def replace_model(self, bundle_digest: str, pictures: Sequence[StoredPicture], vectors: Embeddings) -> None:
        """All rows anew, with another bundle's embeddings, in one moment.

        Args:
            vectors: (n, dim) float32 in the order of `pictures`.

        Raises:
            BusyError: the rows have changed since `pictures` was read.
        """
        with self._writing() as database:
            rows = database.execute("SELECT slot, sha256, identity FROM picture ORDER BY slot").fetchall()
            row_of = {picture.sha256: k for k, picture in enumerate(pictures)}
            if {sha256 for _, sha256, _ in rows} != set(row_of):
                raise BusyError(f"{self.folder}: changed while its pictures were embedded again; run it once more")
            file = new_vectors_name()
            order = [row_of[sha256] for _, sha256, _ in rows]
            write_slots(self.folder / file, range(len(rows)), vectors[order])
            self._name_model(database, bundle_digest, vectors.shape[1], file)
            database.execute("DELETE FROM free_slot")
            for new, ((slot, _, _), k, checksum) in enumerate(
                zip(rows, order, checksums(vectors[order]), strict=True)
            ):  # ascending, and never upwards: no slot is taken twice on the way
                picture, number = pictures[k], int(checksum.view(np.int64))
                seal = _row_seal(
                    new, picture.name, picture.sha256, os.fsencode(picture.source), picture.enrolled_utc, number
                )
                database.execute(
                    "UPDATE picture SET slot = ?, checksum = ?, seal = ? WHERE slot = ?", (new, number, seal, slot)
                )
        self._tidy_up()

    def _tidy_up(self) -> None:
        with self._writing():
            pass

    def _tidy(self, database: sqlite3.Connection) -> None:
        """Overwrite what freed slots hold, and remove files of other models; also what a killed writer left to do.

        Under the write lock, so that nobody takes such a slot meanwhile.
        """
        _, dim, file = self._model(database)
        slots = [slot for (slot,) in database.execute("SELECT slot FROM free_slot WHERE NOT wiped ORDER BY slot")]
        write_slots(self.folder / file, slots, np.zeros((len(slots), dim), np.float32))
        database.execute("UPDATE free_slot SET wiped = 1 WHERE NOT wiped")
        for path in self.folder.glob("vectors-*.f32"):
            if path.name != file:
                path.unlink()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / DATABASE
        try:
            if path.exists() and path.stat().st_nlink > 1:
                raise IntegrityError(f"{path}: has a second name (hard link), which SQLite does not survive; copy it")
            # A connection for each piece of work: none is shared between threads or carried across a fork.
            database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                database.executescript(
                    "PRAGMA synchronous = EXTRA; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON"
                )
                (application,) = database.execute("PRAGMA application_id").fetchone()
                (version,) = database.execute("PRAGMA user_version").fetchone()
                tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if tables and application != _APPLICATION_ID:
                    raise IntegrityError(f"{path}: is another program's database; choose another folder")
                if version > _FORMAT:
                    raise IntegrityError(f"{path}: format {version}, this program reads {_FORMAT}; use a newer version")
                yield database
            finally:
                database.close()  # rolls back what was not committed
        except sqlite3.Error as error:
            raise _as_ours(path, error) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN")
            yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            self._tidy(database)
            yield database
            database.execute("UPDATE change SET number = number + 1")
            database.execute("COMMIT")

    def _model(self, database: sqlite3.Connection) -> tuple[str, int, str]:
        rows = database.execute("SELECT bundle_digest, dim, vectors, seal FROM model").fetchall()
        if len(rows) != 1 or _seal(*rows[0][:3]) != rows[0][3]:
            raise IntegrityError(f"{self.folder / DATABASE}: damaged (model record); restore it from a copy")
        digest, dim, vectors, _ = rows[0]
        return digest, dim, vectors

    def _name_model(self, database: sqlite3.Connection, bundle_digest: str, dim: int, vectors: str) -> None:
        database.execute("DELETE FROM model")
        record = (bundle_digest, dim, vectors)
        database.execute("INSERT INTO model VALUES (?, ?, ?, ?)", (*record, _seal(*record)))


def _pictures(database: sqlite3.Connection, name: str | None) -> list[StoredPicture]:
    return [
        StoredPicture(str(row[1]), row[2], os.fsdecode(row[3]), row[4], row[0], _row_seal(*row[:6]) != row[6])
        for row in database.execute(f"{_ROWS} WHERE ? IS NULL OR name = ? ORDER BY name, slot", (name, name))
    ]


def _read_rows(database: sqlite3.Connection, change: int) -> Rows:
    sound, damaged = [], 0
    for slot, name, sha256, source, when, checksum, seal in database.execute(f"{_ROWS} ORDER BY slot"):
        if _row_seal(slot, name, sha256, source, when, checksum) == seal:
            sound.append((slot, name, checksum))
        else:
            damaged += 1
    names = sorted({name for _, name, _ in sound})
    index = {name: k for k, name in enumerate(names)}
    return Rows(
        change,
        np.array([slot for slot, _, _ in sound], np.int64),
        np.array([index[name] for _, name, _ in sound], np.int64),
        np.array([checksum for _, _, checksum in sound], np.int64).view(np.uint64),
        tuple(names),
        damaged,
    )


def _change(database: sqlite3.Connection) -> int:
    (number,) = database.execute("SELECT number FROM change").fetchone()
    return int(number)


def _free(database: sqlite3.Connection, name: str) -> int:
    query = "SELECT slot FROM picture JOIN identity ON identity.id = picture.identity WHERE name = ?"
    slots = database.execute(query, (name,)).fetchall()
    database.executemany("DELETE FROM picture WHERE slot = ?", slots)
    database.execute("DELETE FROM identity WHERE name = ?", (name,))
    database.executemany("INSERT INTO free_slot VALUES (?, 0)", slots)
    return len(slots)


def _free_slots(database: sqlite3.Connection, number: int) -> list[int]:
    """Slots that no row names: wiped ones first, then behind the last."""
    query = "SELECT slot FROM free_slot WHERE wiped ORDER BY slot LIMIT ?"
    slots = [slot for (slot,) in database.execute(query, (number,))]
    database.executemany("DELETE FROM free_slot WHERE slot = ?", [(slot,) for slot in slots])
    (end,) = database.execute(
        "SELECT 1 + max((SELECT coalesce(max(slot), -1) FROM picture), (SELECT coalesce(max(slot), -1) FROM free_slot),"
        " ?)",
        (max(slots, default=-1),),
    ).fetchone()
    return slots + list(range(end, end + number - len(slots)))


def _row_seal(slot: int, name: str, sha256: bytes, source: bytes, when: str, checksum: int) -> bytes:
    return _seal(slot, name, sha256, source, when, checksum)


def _seal(*values: object) -> bytes:
    """SHA-256 over a record's values, 16 bytes: SQLite itself does not notice a flipped bit in a page."""
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).digest()[:16]


def _as_ours(path: Path, error: sqlite3.Error) -> Exception:
    text = str(error)
    if "locked" in text or "busy" in text:
        return BusyError(f"{path}: another process has held it for {_BUSY_S:.0f} s; try again")
    if any(word in text for word in ("full", "readonly", "unable to open", "disk I/O", "permission")):
        return EnvironmentFault(f"{path}: {text}; nothing was changed")
    return IntegrityError(f"{path}: damaged or no gallery ({text}); restore it from a copy")
