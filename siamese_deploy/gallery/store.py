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
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt

from siamese_deploy.durable_files import fsync_path
from siamese_deploy.errors import BusyError, EnvironmentFault, InputDataError, IntegrityError
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
_MOST_SLOTS = 2**31
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
INSERT INTO change VALUES (random());
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
class Group:
    """Pictures of one identity to be enrolled."""

    name: str
    pictures: Sequence[StoredPicture]
    vectors: Embeddings
    """(n_pictures, dim) float32."""


@dataclass(frozen=True)
class Rows:
    """All rows at one moment, by slot: 24 bytes each, and the identities' names."""

    change: int
    """Another number after every change."""
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
                for statement in filter(None, map(str.strip, _SCHEMA.split(";"))):
                    database.execute(statement)
                _name_model(database, bundle_digest, dim, new_vectors_name())
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
            return _pictures(database, name)

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
                _mend_index(database)
            with VectorFile(self.folder / file, dim) as stored:
                for group in groups:
                    outcome = _new_pictures(database, stored, group, add, replace)
                    outcomes.append(outcome)
                    if isinstance(outcome, list):
                        slots += _insert(database, group, outcome)
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
            _mend_index(database)
            removed = 0
            for name in dict.fromkeys(names):
                count = _free(database, name)
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
            change = _change(database)
            rows = known if known is not None and known.change == change else _read_rows(database, change)
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
            if _change(database) != change:
                raise BusyError(f"{self.folder}: changed while its pictures were embedded again; run it once more")
            file = new_vectors_name()
            write_slots(self.folder / file, range(len(vectors)), vectors)
            _name_model(database, bundle_digest, vectors.shape[1], file)
            database.execute("DELETE FROM free_slot")
            # Ascending, and never upwards: no slot is taken twice on the way.
            for slot, (k, checksum) in enumerate(zip(by_slot, checksums(vectors), strict=True)):
                picture, number = pictures[k], int(checksum.view(np.int64))
                source = os.fsencode(picture.source)
                seal = _seal(slot, picture.name, picture.sha256, source, picture.enrolled_utc, number)
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
        _change(database)
        _check_slots(database)
        slots = [slot for (slot,) in database.execute("SELECT slot FROM free_slot WHERE NOT wiped ORDER BY slot")]
        write_slots(self.folder / file, slots, np.zeros((len(slots), dim), np.float32))
        database.execute("UPDATE free_slot SET wiped = 1 WHERE NOT wiped")
        cut_behind(self.folder / file, _end(database) * dim * 4)
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
                (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                (application,) = database.execute("PRAGMA application_id").fetchone()
                (version,) = database.execute("PRAGMA user_version").fetchone()
                if tables and application != _APPLICATION_ID:
                    raise IntegrityError(
                        f"{path}: is another program's database; choose another folder", code="not-ours"
                    )
                if version > _FORMAT:
                    raise IntegrityError(
                        f"{path}: format {version}, this program reads {_FORMAT}; use a newer version",
                        code="other-version",
                    )
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
        if len(rows) != 1 or _seal(*rows[0][:3]) != rows[0][3]:
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


def _new_pictures(
    database: sqlite3.Connection, stored: VectorFile, group: Group, add: bool, replace: bool
) -> list[int] | SkippedFile:
    """Indices of those to insert, or why none may be. Rows that give way to them are freed."""
    new: dict[bytes, int] = {}
    damaged: list[int] = []
    for k, picture in enumerate(group.pictures):
        row = database.execute(f"{_ROWS} WHERE sha256 = ?", (picture.sha256,)).fetchone()
        if row is not None and row[1] != group.name:
            reason = f"{picture.source or 'the picture'} is enrolled as {row[1]} already"
            return SkippedFile(group.name, reason, code="enrolled-elsewhere")
        is_damaged = row is not None and (_seal(*row[:6]) != row[6] or stored.checksum(row[0]) != row[5])
        if is_damaged:
            damaged.append(row[0])
        if row is None or is_damaged or replace:
            new.setdefault(picture.sha256, k)
    known = database.execute("SELECT 1 FROM identity WHERE name = ?", (group.name,)).fetchone()
    if known and len(new) > len(damaged) and not (add or replace):
        reason = f"is enrolled already; --add adds the {len(new)} new pictures, --replace takes them instead"
        return SkippedFile(group.name, reason, code="already-enrolled")
    if replace and new:
        _free(database, group.name)
    else:
        _free_slots(database, damaged)
    return list(new.values())


def _insert(database: sqlite3.Connection, group: Group, indices: Sequence[int]) -> list[int]:
    """Rows for these of its pictures; gives their slots."""
    if not indices:
        return []
    database.execute("INSERT OR IGNORE INTO identity (name) VALUES (?)", (group.name,))
    (identity,) = database.execute("SELECT id FROM identity WHERE name = ?", (group.name,)).fetchone()
    slots = _take_slots(database, len(indices))
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for slot, k, checksum in zip(slots, indices, checksums(group.vectors[list(indices)]), strict=True):
        picture, number = group.pictures[k], int(checksum.view(np.int64))
        source = os.fsencode(picture.source)
        seal = _seal(slot, group.name, picture.sha256, source, when, number)
        row = (slot, identity, picture.sha256, source, when, number, seal)
        database.execute("INSERT INTO picture VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return slots


def _pictures(database: sqlite3.Connection, name: str | None) -> list[StoredPicture]:
    rows = database.execute(f"{_ROWS} WHERE ? IS NULL OR name = ? ORDER BY name, slot", (name, name))
    return [
        StoredPicture(str(name), _bytes(sha256), os.fsdecode(_bytes(source)), str(when), slot, _seal(*row) != seal)
        for *row, seal in rows
        for slot, name, sha256, source, when, _ in [row]
    ]


def _bytes(value: object) -> bytes:
    """SQLite keeps a type with every value: in a damaged row it may be another."""
    return value if isinstance(value, bytes) else b""


def _read_rows(database: sqlite3.Connection, change: int) -> Rows:
    (count,) = database.execute("SELECT count(*) FROM picture").fetchone()
    slots, identities, numbers = (np.empty(count, np.int64) for _ in range(3))
    index: dict[str, int] = {}
    n_sound = 0
    for *row, seal in database.execute(f"{_ROWS} ORDER BY slot"):
        if _seal(*row) != seal:
            continue
        slots[n_sound], numbers[n_sound] = row[0], row[5]
        identities[n_sound] = index.setdefault(row[1], len(index))
        n_sound += 1
    names = sorted(index)
    place = np.empty(len(names), np.int64)
    place[[index[name] for name in names]] = np.arange(len(names))
    return Rows(
        change,
        slots[:n_sound],
        place[identities[:n_sound]],
        numbers[:n_sound].view(np.uint64),
        tuple(names),
        count - n_sound,
    )


def _change(database: sqlite3.Connection) -> int:
    row = database.execute("SELECT number FROM change").fetchone()
    if row is None or not isinstance(row[0], int):
        raise sqlite3.DatabaseError("change record")
    return int(row[0])


def _name_model(database: sqlite3.Connection, bundle_digest: str, dim: int, vectors: str) -> None:
    database.execute("DELETE FROM model")
    record = (bundle_digest, dim, vectors)
    database.execute("INSERT INTO model VALUES (?, ?, ?, ?)", (*record, _seal(*record)))


def _free(database: sqlite3.Connection, name: str) -> int:
    query = "SELECT slot FROM picture JOIN identity ON identity.id = picture.identity WHERE name = ?"
    slots = [slot for (slot,) in database.execute(query, (name,))]
    _free_slots(database, slots)
    database.execute("DELETE FROM identity WHERE name = ?", (name,))
    return len(slots)


def _free_slots(database: sqlite3.Connection, slots: Sequence[int]) -> None:
    values = [(slot,) for slot in slots]
    database.executemany("DELETE FROM picture WHERE slot = ?", values)
    database.executemany("INSERT INTO free_slot VALUES (?, 0)", values)


def _take_slots(database: sqlite3.Connection, number: int) -> list[int]:
    """Slots that no row names: wiped ones first, then behind the last."""
    end = _end(database)
    query = "SELECT slot FROM free_slot WHERE wiped ORDER BY slot LIMIT ?"
    slots = [slot for (slot,) in database.execute(query, (number,))]
    database.executemany("DELETE FROM free_slot WHERE slot = ?", [(slot,) for slot in slots])
    return slots + list(range(end, end + number - len(slots)))


def _mend_index(database: sqlite3.Connection) -> None:
    """A row that the index of identities misses would stay behind a removal. The rows, which have seals, are right.

    Two quick sums instead of SQLite's own check, which takes seconds for a million rows.
    """
    sums = "SELECT count(*), total((31 * slot + identity) % 1000003) FROM picture"
    found = [database.execute(f"{sums} {way}").fetchone() for way in ("NOT INDEXED", "INDEXED BY picture_of_identity")]
    if found[0] != found[1]:
        database.execute("REINDEX picture")


def _check_slots(database: sqlite3.Connection) -> None:
    """A damaged slot would have another's vector overwritten, or one written terabytes behind the last."""
    lowest = "SELECT min(coalesce((SELECT min(slot) FROM picture), 0), coalesce((SELECT min(slot) FROM free_slot), 0))"
    (first,) = database.execute(lowest).fetchone()
    shared = database.execute("SELECT 1 FROM free_slot JOIN picture USING (slot)").fetchone()
    if first < 0 or shared or _end(database) > _MOST_SLOTS:
        raise sqlite3.DatabaseError("slots")


def _end(database: sqlite3.Connection) -> int:
    """The first slot behind all that are or were used."""
    query = "SELECT max(coalesce((SELECT max(slot) FROM picture), -1), coalesce((SELECT max(slot) FROM free_slot), -1))"
    (last,) = database.execute(query).fetchone()
    return int(last) + 1


def _seal(*values: object) -> bytes:
    """SHA-256 over a record's values, 16 bytes: SQLite itself does not notice a flipped bit in a page."""
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).digest()[:16]


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
