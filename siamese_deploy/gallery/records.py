"""The records of a gallery's database, once it is open: rows with their seals, identities, slots and free slots."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt

from siamese_deploy.gallery.vectors import VectorFile, checksums
from siamese_deploy.image_folder import SkippedFile
from siamese_deploy.verifier import Embeddings

_MOST_SLOTS = 2**31
SCHEMA = """
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
SCHEMA_TEXTS = {text for text in map(str.strip, SCHEMA.split(";")) if text.startswith("CREATE")} | {
    "CREATE TABLE sqlite_sequence(name,seq)"  # SQLite's own, for AUTOINCREMENT
}
"""As SQLite keeps them. Another type of a column, or a trigger, would make other things of the same records."""
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


def new_pictures(
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
        is_damaged = row is not None and (seal_of(*row[:6]) != row[6] or stored.checksum(row[0]) != row[5])
        if is_damaged:
            damaged.append(row[0])
        if row is None or is_damaged or replace:
            new.setdefault(picture.sha256, k)
    known = database.execute("SELECT 1 FROM identity WHERE name = ?", (group.name,)).fetchone()
    if known and len(new) > len(damaged) and not (add or replace):
        reason = f"is enrolled already; --add adds the {len(new)} new pictures, --replace takes them instead"
        return SkippedFile(group.name, reason, code="already-enrolled")
    if replace and new:
        free_identity(database, group.name)
    else:
        _free_slots(database, damaged)
    return list(new.values())


def insert_rows(database: sqlite3.Connection, group: Group, indices: Sequence[int]) -> list[int]:
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
        seal = seal_of(slot, group.name, picture.sha256, source, when, number)
        row = (slot, identity, picture.sha256, source, when, number, seal)
        database.execute("INSERT INTO picture VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    return slots


def read_pictures(database: sqlite3.Connection, name: str | None) -> list[StoredPicture]:
    rows = database.execute(f"{_ROWS} WHERE ? IS NULL OR name = ? ORDER BY name, slot", (name, name))
    return [
        StoredPicture(str(name), _bytes(sha256), os.fsdecode(_bytes(source)), str(when), slot, seal_of(*row) != seal)
        for *row, seal in rows
        for slot, name, sha256, source, when, _ in [row]
    ]


def _bytes(value: object) -> bytes:
    """SQLite keeps a type with every value: in a damaged row it may be another."""
    return value if isinstance(value, bytes) else b""


def read_rows(database: sqlite3.Connection, change: int) -> Rows:
    (count,) = database.execute("SELECT count(*) FROM picture NOT INDEXED").fetchone()
    slots, identities, numbers = (np.empty(count, np.int64) for _ in range(3))
    index: dict[str, int] = {}
    n_sound, last = 0, -1
    for *row, seal in database.execute(f"{_ROWS} ORDER BY slot"):
        if seal_of(*row) != seal:
            continue
        if row[0] <= last or n_sound == count:
            raise sqlite3.DatabaseError("its rows are out of order")
        last = row[0]
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


def change_number(database: sqlite3.Connection) -> int:
    row = database.execute("SELECT number FROM change").fetchone()
    if row is None or not isinstance(row[0], int):
        raise sqlite3.DatabaseError("change record")
    return int(row[0])


def name_model(database: sqlite3.Connection, bundle_digest: str, dim: int, vectors: str) -> None:
    database.execute("DELETE FROM model")
    record = (bundle_digest, dim, vectors)
    database.execute("INSERT INTO model VALUES (?, ?, ?, ?)", (*record, seal_of(*record)))


def free_identity(database: sqlite3.Connection, name: str) -> int:
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
    end = first_unused_slot(database)
    query = "SELECT slot FROM free_slot WHERE wiped ORDER BY slot LIMIT ?"
    slots = [slot for (slot,) in database.execute(query, (number,))]
    database.executemany("DELETE FROM free_slot WHERE slot = ?", [(slot,) for slot in slots])
    return slots + list(range(end, end + number - len(slots)))


def mend_index(database: sqlite3.Connection) -> None:
    """A row that the index of identities misses would stay behind a removal. The rows, which have seals, are right.

    Two quick sums instead of SQLite's own check, which takes seconds for a million rows.
    """
    sums = "SELECT count(*), total((31 * slot + identity) % 1000003) FROM picture"
    found = [database.execute(f"{sums} {way}").fetchone() for way in ("NOT INDEXED", "INDEXED BY picture_of_identity")]
    if found[0] != found[1]:
        database.execute("REINDEX picture")


def check_slots(database: sqlite3.Connection) -> None:
    """A damaged slot would have another's vector overwritten, or one written terabytes behind the last."""
    lowest = "SELECT min(coalesce((SELECT min(slot) FROM picture), 0), coalesce((SELECT min(slot) FROM free_slot), 0))"
    (first,) = database.execute(lowest).fetchone()
    shared = database.execute("SELECT 1 FROM free_slot JOIN picture USING (slot)").fetchone()
    if first < 0 or shared or first_unused_slot(database) > _MOST_SLOTS:
        raise sqlite3.DatabaseError("slots")


def first_unused_slot(database: sqlite3.Connection) -> int:
    """The first slot behind all that are or were used."""
    query = "SELECT max(coalesce((SELECT max(slot) FROM picture), -1), coalesce((SELECT max(slot) FROM free_slot), -1))"
    (last,) = database.execute(query).fetchone()
    return int(last) + 1


def seal_of(*values: object) -> bytes:
    """SHA-256 over a record's values, 16 bytes: SQLite itself does not notice a flipped bit in a page."""
    return hashlib.sha256(repr(values).encode("utf-8", "backslashreplace")).digest()[:16]
