"""What a gallery keeps on disk: who is enrolled in SQLite, and the embeddings in one flat file beside it.

    gallery.sqlite     identities, one row per picture (slot, SHA-256 of the picture, source, checksum), free slots
    vectors-<id>.f32   slot k is the k-th (dim,) little-endian float32 vector; slots that no row names hold nothing

A vector is written to a slot that nobody names and synced before the transaction that names it, and a slot is wiped
only after the transaction that freed it. So a kill or a power cut at any moment leaves every acknowledged row and no
half one. SQLite's rollback journal makes writers wait for readers, so no slot changes under a reader.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from siamese_deploy.durable_files import fsync_path
from siamese_deploy.errors import BusyError, EnvironmentFault, InputDataError, IntegrityError
from siamese_deploy.gallery.records import (
    SCHEMA,
    SCHEMA_TEXTS,
    Group,
    Rows,
    StoredPicture,
    change_number,
    check_slots,
    first_unused_slot,
    free_identity,
    insert_rows,
    mend_index,
    name_model,
    new_pictures,
    read_pictures,
    read_rows,
    seal_of,
)
from siamese_deploy.gallery.vectors import VectorFile, checksums, cut_behind, new_vectors_name, write_slots
from siamese_deploy.image_folder import SkippedFile
from siamese_deploy.private_folder import private_folder
from siamese_deploy.verifier import Embeddings

DATABASE = "gallery.sqlite"
CHUNK_ROWS = 2048
"""Vectors in memory at a time."""
_APPLICATION_ID = 0x53474C59  # "SGLY"
_FORMAT = 1
_BUSY_S = 60.0


@dataclass(frozen=True)
class Snapshot:
    rows: Rows
    vectors: VectorFile
    _database: sqlite3.Connection

    def pictures(self) -> list[StoredPicture]:
        return read_pictures(self._database, None)

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

    def sound_vectors_of(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], Embeddings]]:
        """`sound_vectors` of a few rows, ascending, far apart: each is read by itself."""
        buffer = np.empty((min(CHUNK_ROWS, len(rows)), self.vectors.dim), np.float32)
        for start in range(0, len(rows), CHUNK_ROWS):
            row = rows[start : start + CHUNK_ROWS]
            chunk = buffer[: len(row)]
            self.vectors.read_each(self.rows.slots[row].tolist(), chunk)
            sound = checksums(chunk) == self.rows.checksums[row]
            yield row[sound], chunk if sound.all() else chunk[sound]


class GalleryStore:
    """One gallery folder. Safe with several threads and processes: nothing stays open between two calls.

    Raises of every method:
        IntegrityError: not a gallery, of a newer format, damaged as a database, or of another bundle.
        BusyError: another process held it for a minute.
        EnvironmentFault: disk full, not writable, or others may write into the folder.

    Args:
        bundle_digest: the bundle it has to be of, at every call; None for whichever it is.
    """

    def __init__(self, folder: Path, bundle_digest: str | None = None) -> None:
        if not (folder / DATABASE).exists():
            raise _no_gallery(folder, "missing")
        self.folder = private_folder(folder)
        self.bundle_digest = bundle_digest
        self.model()

    @classmethod
    def create(cls, folder: Path, bundle_digest: str, dim: int) -> GalleryStore:
        """Make an empty gallery, or open the one that is there."""
        store = cls.__new__(cls)
        store.folder, store.bundle_digest = private_folder(folder), bundle_digest
        with store._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
                database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                database.execute(f"PRAGMA user_version = {_FORMAT}")
                for statement in filter(None, map(str.strip, SCHEMA.split(";"))):
                    database.execute(statement)
                name_model(database, bundle_digest, dim, new_vectors_name())
                (folder / DATABASE).chmod(0o600)
            database.execute("COMMIT")
        fsync_path(folder)
        return cls(folder, bundle_digest)

    def model(self) -> tuple[str, int]:
        """Digest of the bundle that made the embeddings, and their dimension."""
        with self._reading() as database:
            return self._model(database)[:2]

    def pictures(self, name: str | None = None) -> list[StoredPicture]:
        """All rows, or those of one identity, ordered by name and slot."""
        with self._reading() as database:
            return read_pictures(database, name)

    def enrol(
        self, groups: Sequence[Group], *, add: bool = False, replace: bool = False
    ) -> list[list[int] | SkippedFile]:
        """Add pictures of several identities, each whole or not at all; on the disk when this returns.

        Pictures that are enrolled under the same name already are left alone, unless their row is damaged.

        Args:
            add: an identity that is enrolled may get new pictures.
            replace: its earlier pictures go in the same moment.

        Returns:
            For each group the indices of its pictures that were enrolled, or the reason why it was refused.
        """
        for group in groups:
            if not np.isfinite(group.vectors).all():
                raise IntegrityError(
                    "an embedding is not finite (NaN or infinity); nothing was enrolled", code="not-finite"
                )
        self._announce_use_of_slots(sum(len(group.pictures) for group in groups))
        outcomes: list[list[int] | SkippedFile] = []
        slots: list[int] = []
        vectors: list[Embeddings] = []
        with self._writing() as database:
            _, dim, file = self._model(database)
            if replace:
                mend_index(database)
            with VectorFile(self.folder / file, dim) as stored:
                for group in groups:
                    outcome = new_pictures(database, stored, group, add, replace)
                    outcomes.append(outcome)
                    if isinstance(outcome, list):
                        slots += insert_rows(database, group, outcome)
                        vectors += [group.vectors[k] for k in outcome]
            if slots:
                order = np.argsort(slots)
                write_slots(self.folder / file, [slots[k] for k in order], np.stack([vectors[k] for k in order]))
        if replace:
            self._tidy_up()
        return outcomes

    def remove(self, names: Sequence[str]) -> int:
        """Remove identities, all of them or none; their vectors are overwritten. Returns the number of rows.

        Raises:
            InputDataError: one of them is not enrolled.
        """
        with self._writing() as database:
            mend_index(database)
            removed = 0
            for name in dict.fromkeys(names):
                count = free_identity(database, name)
                if not count:
                    raise InputDataError(
                        f"{name}: no such identity in {self.folder}; nothing was removed", code="not-enrolled"
                    )
                removed += count
        self._tidy_up()
        return removed

    @contextmanager
    def snapshot(self, known: Rows | None = None) -> Iterator[Snapshot]:
        """Rows and vectors as they are now, and as they stay until the block ends; writers wait.

        `known` are rows of an earlier snapshot, given again if nothing has changed.
        """
        with self._reading() as database:
            _, dim, file = self._model(database)
            change = change_number(database)
            rows = known if known is not None and known.change == change else read_rows(database, change)
            with VectorFile(self.folder / file, dim) as vectors:
                yield Snapshot(rows, vectors, database)

    def replace_model(
        self, bundle_digest: str, change: int, pictures: Sequence[StoredPicture], vectors: Embeddings
    ) -> None:
        """All rows anew, with another bundle's embeddings, in one moment.

        Args:
            change: of the snapshot that `pictures` are from.
            vectors: (n, dim) float32 in the order of `pictures`.

        Raises:
            BusyError: the gallery has changed since.
        """
        by_slot = sorted(range(len(pictures)), key=lambda k: pictures[k].slot)
        vectors = vectors[by_slot]
        with self._writing() as database:
            if change_number(database) != change:
                raise BusyError(f"{self.folder}: changed while its pictures were embedded again; run it once more")
            file = new_vectors_name()
            write_slots(self.folder / file, range(len(vectors)), vectors)
            name_model(database, bundle_digest, vectors.shape[1], file)
            database.execute("DELETE FROM free_slot")
            # Ascending, and never upwards: no slot is taken twice on the way.
            for slot, (k, checksum) in enumerate(zip(by_slot, checksums(vectors), strict=True)):
                picture, number = pictures[k], int(checksum.view(np.int64))
                source = os.fsencode(picture.source)
                seal = seal_of(slot, picture.name, picture.sha256, source, picture.enrolled_utc, number)
                values = (slot, number, seal, picture.slot)
                database.execute("UPDATE picture SET slot = ?, checksum = ?, seal = ? WHERE slot = ?", values)
        self._tidy_up()

    def _announce_use_of_slots(self, number: int) -> None:
        """Freed slots that may be written to next count as not wiped from before that on: a killed writer, whose
        transaction is undone, may have left something there."""
        with self._connected() as database:
            if database.execute("SELECT 1 FROM free_slot WHERE wiped").fetchone():
                chosen = "SELECT slot FROM free_slot WHERE wiped ORDER BY slot LIMIT ?"
                database.execute("BEGIN IMMEDIATE")
                slots = database.execute(chosen, (number,)).fetchall()
                database.executemany("UPDATE free_slot SET wiped = 0 WHERE slot = ?", slots)
                database.execute("COMMIT")

    def _tidy_up(self) -> None:
        try:
            with self._writing():
                pass
        except (BusyError, EnvironmentFault) as error:
            raise type(error)(
                f"{error}; removed, but not yet overwritten on the disk: the next change does it", code=error.code
            ) from error

    def _tidy(self, database: sqlite3.Connection) -> None:
        """Overwrite what freed slots hold, and remove what a killed writer left: rows behind the last, other files.

        Under the write lock, so that nobody takes such a slot meanwhile.
        """
        _, dim, file = self._model(database)
        change_number(database)
        check_slots(database)
        slots = [slot for (slot,) in database.execute("SELECT slot FROM free_slot WHERE NOT wiped ORDER BY slot")]
        write_slots(self.folder / file, slots, np.zeros((len(slots), dim), np.float32))
        database.execute("UPDATE free_slot SET wiped = 1 WHERE NOT wiped")
        cut_behind(self.folder / file, first_unused_slot(database) * dim * 4)
        for path in self.folder.glob("vectors-*.f32"):
            if path.name != file:
                path.unlink()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / DATABASE
        try:
            if path.exists() and path.stat().st_nlink > 1:
                raise IntegrityError(
                    f"{path}: has a second name (hard link), which SQLite does not survive; copy it", code="hard-link"
                )
            # A connection for each piece of work: threads share none.
            database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            # Where a flipped bit makes a text invalid, its seal tells.
            database.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
            try:
                database.executescript(
                    "PRAGMA synchronous = EXTRA; PRAGMA secure_delete = ON; PRAGMA foreign_keys = ON"
                )
                # In this order: another process may be making it right now.
                schema = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
                (application,) = database.execute("PRAGMA application_id").fetchone()
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if schema and application != _APPLICATION_ID:
                    raise IntegrityError(
                        f"{path}: is another program's database; choose another folder", code="not-ours"
                    )
                if version > _FORMAT:
                    raise IntegrityError(
                        f"{path}: format {version}, this program reads {_FORMAT}; use a newer version",
                        code="other-version",
                    )
                if schema and {text for (text,) in schema} != SCHEMA_TEXTS:
                    raise sqlite3.DatabaseError("its schema is not what it was made with")
                yield database
            finally:
                database.close()  # rolls back what was not committed
        except UnicodeDecodeError as error:  # SQLite quotes a damaged schema in its message
            raise IntegrityError(f"{path}: damaged; restore it from a copy", code="gallery-damaged") from error
        except sqlite3.Error as error:
            raise _as_ours(path, error) from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN")
            if not database.execute("SELECT 1 FROM sqlite_master").fetchone():  # killed while it was made
                raise _no_gallery(self.folder, "empty")
            yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            self._tidy(database)
            yield database
            # Not counted up: a gallery made anew, or put back from a copy, must not meet a number again.
            database.execute("UPDATE change SET number = random()")
            database.execute("COMMIT")
            try:
                # SQLite does so too, but takes a folder that it cannot open for one that is synced.
                fsync_path(self.folder)
            except OSError as error:
                raise EnvironmentFault(
                    f"{self.folder}: {error.strerror}; changed, but a power cut may still undo it"
                ) from error

    def _model(self, database: sqlite3.Connection) -> tuple[str, int, str]:
        rows = database.execute("SELECT bundle_digest, dim, vectors, seal FROM model").fetchall()
        if len(rows) != 1 or seal_of(*rows[0][:3]) != rows[0][3]:
            raise IntegrityError(
                f"{self.folder / DATABASE}: damaged (model record); restore it from a copy", code="gallery-damaged"
            )
        digest, dim, vectors, _ = rows[0]
        if self.bundle_digest not in (None, digest):
            raise IntegrityError(
                f"{self.folder}: is enrolled with another bundle (expected {digest[:12]}, got "
                f"{str(self.bundle_digest)[:12]}); use that one, or run: siamese gallery reembed",
                code="gallery-other-bundle",
            )
        return digest, dim, vectors


def _no_gallery(folder: Path, what: str) -> InputDataError:
    return InputDataError(
        f"{folder}: is no gallery ({DATABASE} is {what}); siamese gallery enrol makes one", code="not-found"
    )


def _as_ours(path: Path, error: sqlite3.Error) -> Exception:
    text = str(error)
    if "locked" in text or "busy" in text:
        return BusyError(f"{path}: another process has held it for {_BUSY_S:.0f} s; try again")
    if any(word in text for word in ("full", "readonly", "unable to open", "disk I/O", "permission")):
        return EnvironmentFault(f"{path}: {text}", code="disk-full" if "full" in text else "environment")
    if _is_unreadable(path):
        return EnvironmentFault(f"{path}: cannot be read; look at the disk, or restore it from a copy")
    return IntegrityError(f"{path}: damaged or no gallery ({text}); restore it from a copy", code="gallery-damaged")


def _is_unreadable(path: Path) -> bool:
    """Whether the disk fails to give a page. SQLite calls that malformed too, but not while it copies pages.

    Not by open(): its close would end the locks that other threads of the process have on the file.
    """
    try:
        with closing(sqlite3.connect(path)) as database, closing(sqlite3.connect("")) as copy:
            database.backup(copy)
    except sqlite3.OperationalError:
        return True
    except sqlite3.Error:
        return False
    return False
