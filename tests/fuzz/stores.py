"""Galleries and embedding caches whose files were damaged: never a wrong match, never another vector."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.driver import Target
from fuzz.mutations import flipped, mutated
from PIL import Image
from tiny_bundle import SIZE_HW, make_bundle

import siamese_deploy.cache_file
import siamese_deploy.gallery.store
from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.cache_file import FILE_NAME, remove_cache_file
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import SiameseError
from siamese_deploy.gallery.copies import export_gallery
from siamese_deploy.gallery.store import DATABASE

PEOPLE = ("Ann", "Bo", "C\u00e9", "Di")


def _damaged(random: np.random.RandomState, data: bytes, pool: list[bytes]) -> bytes:
    """Mostly where there is something: a database is half empty pages."""
    if random.randint(3) == 0:
        return mutated(random, data, pool)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = int(used[random.randint(len(used))])
        if random.randint(2):
            changed = bytearray(flipped(bytes(changed), 8 * at + random.randint(8)))
        else:
            changed[at] = (0, 1, 2, 5, 6, 7, 8, 9, 10, 12, 13, 127, 128, 255)[random.randint(14)]
    return bytes(changed)


def _edited(random: np.random.RandomState, folder: Path, data: bytes, edits: tuple[str, ...]) -> bytes:
    """A database that is whole, with other values in it."""
    file = folder / "edited.sqlite"
    file.write_bytes(data)
    values = (None, 0, -1, 2**63 - 1, -(2**63), 10**9, 0.5, "", "x", "\u00e9", b"", b"\xff" * 16, b"x" * 10**5)
    database = sqlite3.connect(file, isolation_level=None)
    try:
        for _ in range(random.randint(1, 3)):
            statement = edits[random.randint(len(edits))]
            given = [values[random.randint(len(values))] for _ in range(statement.count("?"))]
            try:
                database.execute(statement, given)
            except sqlite3.Error:  # a constraint; nothing is changed then
                pass
    finally:
        database.close()
    return file.read_bytes()


class Galleries(Target):
    """An answer names who was enrolled, with a score of one of its pictures, exactly; or it is an error of ours."""

    EDITS = (
        "UPDATE picture SET slot = ? WHERE slot = 1", "UPDATE picture SET identity = 2 WHERE identity = 1",
        "UPDATE picture SET identity = ?", "UPDATE picture SET sha256 = ? WHERE slot = 2",
        "UPDATE picture SET source = ? WHERE slot = 2", "UPDATE picture SET source = ?",
        "UPDATE picture SET enrolled_utc = ?", "UPDATE picture SET checksum = ? WHERE slot = 3",
        "UPDATE picture SET seal = ? WHERE slot = 3", "UPDATE identity SET name = ? WHERE id = 1",
        "UPDATE identity SET id = ? WHERE id = 1", "DELETE FROM identity WHERE id = 1", "DELETE FROM model",
        "UPDATE model SET dim = ?", "UPDATE model SET vectors = ?", "UPDATE model SET bundle_digest = ?",
        "INSERT INTO model SELECT * FROM model", "UPDATE change SET number = ?", "DELETE FROM change",
        "INSERT INTO free_slot VALUES (?, 0)", "INSERT INTO free_slot VALUES (?, ?)", "UPDATE free_slot SET wiped = ?",
        "INSERT INTO free_slot VALUES (3, 0)", "INSERT INTO free_slot VALUES (3, 1)", "DROP TABLE free_slot",
        "ALTER TABLE picture RENAME COLUMN seal TO sea", "PRAGMA user_version = 9", "PRAGMA application_id = 1",
        "PRAGMA journal_mode = WAL", "CREATE TRIGGER t AFTER INSERT ON picture BEGIN DELETE FROM identity; END",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.whole, self.folder, self.work = folder / "whole", folder / "gallery", folder
        self.verifier = OnnxVerifier(make_bundle(), provider="cpu", threads=1)
        random = np.random.RandomState(0)
        self.pictures = [random.randint(0, 256, (*SIZE_HW, 3)).astype(np.uint8) for _ in range(4 * len(PEOPLE))]
        # The file of vectors has a random name, and an input is to mean the same in every run.
        named = siamese_deploy.gallery.store.new_vectors_name
        siamese_deploy.gallery.store.new_vectors_name = lambda: "vectors-a0f5cafe.f32"
        gallery = Gallery(self.whole, self.verifier, create=True)
        siamese_deploy.gallery.store.new_vectors_name = named
        # One more, removed again, so that there is a free slot.
        for k, name in enumerate(("Ev", *PEOPLE)):
            members = [Image.fromarray(picture) for picture in self.pictures[3 * k - 3 : 3 * k] or self.pictures[-1:]]
            gallery.enrol(name, members, doubles=False)
        gallery.remove("Ev")
        self.probe, self.stranger = self.pictures[4], self.pictures[-2]
        embedding = self.verifier.embed(self.probe[None])
        self.scores = {
            name: [
                float(self.verifier.score(embedding, self.verifier.embed(picture[None]))[0])
                for picture in self.pictures[3 * k : 3 * k + 3]
            ]
            for k, name in enumerate(PEOPLE)
        }
        self.files = {file.name: file.read_bytes() for file in self.whole.iterdir()}
        (self.vectors,) = (name for name in self.files if name != DATABASE)

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        pool = list(self.files.values())
        kind = random.randint(12)
        name = DATABASE
        if kind <= 5:
            data = _damaged(random, self.files[DATABASE], pool)
        elif kind <= 8:
            data = _edited(random, self.work, self.files[DATABASE], self.EDITS)
        elif kind <= 10:
            name, data = self.vectors, _damaged(random, self.files[self.vectors], pool)
        else:  # what a process that was killed, or somebody, left beside it
            name = DATABASE + ("-journal", "-wal", "-shm")[random.randint(3)]
            journal = bytes.fromhex("d9d505f920a163d7") + b"\0\0\0\1" * 4 + self.files[DATABASE]
            data = mutated(random, journal)
        return name.encode() + b"\0" + data

    def check(self, data: bytes) -> str:
        name, _, content = data.partition(b"\0")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.whole, self.folder)
        self.folder.chmod(0o700)
        (self.folder / name.decode()).write_bytes(content)
        try:
            gallery = Gallery(self.folder, self.verifier)
            outcome = self._asked(gallery)
        except SiameseError as error:
            return f"reading {type(error).__name__}"
        try:
            self._listed(gallery)
        except SiameseError as error:
            outcome += f", listing {type(error).__name__}"
        try:
            self._changed(gallery)
        except SiameseError as error:
            return f"{outcome}, writing {type(error).__name__}"
        return outcome

    def _asked(self, gallery: Gallery) -> str:
        found = gallery.identify(self.probe, top=9)
        for candidate in found.candidates:
            assert candidate.name in PEOPLE, candidate
            assert candidate.score in self.scores[candidate.name], (candidate, self.scores[candidate.name])
        rows = sum(candidate.pictures for candidate in found.candidates)
        assert rows <= 3 * len(PEOPLE)
        assert rows + found.damaged <= 3 * len(PEOPLE)
        for name in PEOPLE:
            try:
                candidate = gallery.verify(self.probe, name)
            except SiameseError:
                continue
            assert candidate.score in self.scores[name], (candidate, self.scores[name])
        if rows == 3 * len(PEOPLE):
            return "whole"
        return f"{'some' if rows else 'all'} rows left out{'' if found.damaged else ' unnoticed'}"

    def _listed(self, gallery: Gallery) -> None:
        for picture in gallery.store.pictures():
            assert picture.damaged or picture.name in PEOPLE, picture
        export_gallery(self.folder, self.folder.with_name("export"))
        shutil.rmtree(self.folder.with_name("export"))

    def _changed(self, gallery: Gallery) -> None:
        """Once enrolled in a gallery that was damaged, a picture is found there."""
        gallery.enrol("New", [Image.fromarray(self.stranger)], doubles=False)
        assert gallery.verify(self.stranger, "New").pictures == 1
        gallery.enrol("New", [Image.fromarray(self.pictures[-3])], replace=True, doubles=False)
        self._asked_without_new(gallery)
        gallery.remove("New")
        assert "New" not in {picture.name for picture in gallery.store.pictures()}
        self._asked(gallery)

    def _asked_without_new(self, gallery: Gallery) -> None:
        for candidate in gallery.identify(self.probe, top=9).candidates:
            assert candidate.name == "New" or candidate.score in self.scores[candidate.name], candidate

    def sabotage(self) -> None:
        """Vectors are believed."""

        def checksums(vectors: Any) -> Any:
            class Equal(np.ndarray):
                def __eq__(self, other: object) -> Any:
                    return np.ones(len(self), bool)

            return really(vectors).view(Equal)

        really = siamese_deploy.gallery.store.checksums
        siamese_deploy.gallery.store.checksums = checksums


class Caches(Target):
    """Whatever the file holds, a vector that comes out is the one that was put in."""

    EDITS = (
        "UPDATE embeddings SET key = ? WHERE id = 1", "UPDATE embeddings SET checksum = ?",
        "UPDATE embeddings SET vector = ?", "UPDATE embeddings SET vector = ? WHERE id = 2",
        "UPDATE embeddings SET vector = (SELECT vector FROM embeddings WHERE id = 3) WHERE id = 2",
        "UPDATE embeddings SET checksum = (SELECT checksum FROM embeddings WHERE id = 3) WHERE id = 2",
        "UPDATE embeddings SET id = ? WHERE id = 1", "UPDATE usage SET used = ?",
        "UPDATE usage SET id = ? WHERE id = 2",
        "DELETE FROM usage", "UPDATE clock SET tick = ?", "DELETE FROM clock", "INSERT INTO clock VALUES (?)",
        "DROP TABLE usage", "DROP TABLE embeddings", "ALTER TABLE embeddings RENAME COLUMN vector TO v",
        "PRAGMA user_version = 9", "PRAGMA application_id = 1", "PRAGMA journal_mode = WAL",
        "CREATE TRIGGER t AFTER INSERT ON embeddings BEGIN DELETE FROM usage; END",
    )  # fmt: skip
    DIM = 16

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder / "cache", folder
        random = np.random.RandomState(0)
        self.keys = [hashlib.sha256(bytes([k])).digest() for k in range(12)]
        self.vectors = random.normal(0, 1, (len(self.keys), self.DIM)).astype(np.float32)
        EmbeddingCache(self.folder).put_many(self.keys[:8], self.vectors[:8])
        self.file = self.folder / FILE_NAME
        self.whole = self.file.read_bytes()

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        kind = random.randint(10)
        if kind <= 5:
            return b"\0" + _damaged(random, self.whole, [self.whole])
        if kind <= 8:
            return b"\0" + _edited(random, self.work, self.whole, self.EDITS)
        name = ("-journal", "-wal", "-shm")[random.randint(3)]
        journal = bytes.fromhex("d9d505f920a163d7") + b"\0\0\0\1" * 4 + self.whole
        return name.encode() + b"\0" + mutated(random, journal)

    def check(self, data: bytes) -> str:
        suffix, _, content = data.partition(b"\0")
        for file in self.folder.iterdir():
            file.unlink()
        self.file.write_bytes(self.whole)
        self.file.with_name(self.file.name + suffix.decode()).write_bytes(content)
        try:
            cache = EmbeddingCache(self.folder)
        except SiameseError as error:
            return f"{type(error).__name__}, {self._removed()}"
        found = self._right(cache)
        cache.put_many(self.keys[6:], self.vectors[6:])
        again = self._right(cache)
        outcome = f"{'all' if found == 8 else 'some' if found else 'none'} found"
        outcome += ", all after writing" if again == len(self.keys) else ""
        outcome += f", given up {cache.warning.split(': ')[0]!r}" if cache.warning else ""
        for use in (cache.stat, lambda: cache.prune(0)):
            try:
                use()
            except SiameseError as error:
                outcome += f", {type(error).__name__}"
        self._right(cache)
        return f"{outcome}, {self._removed()}"

    def _right(self, cache: EmbeddingCache) -> int:
        found = cache.get_many(self.keys, self.DIM)
        for key, vector in found.items():
            assert np.array_equal(vector, self.vectors[self.keys.index(key)]), "another vector"
        return len(found)

    def _removed(self) -> str:
        try:
            remove_cache_file(self.file)
        except SiameseError as error:
            return f"not removed, {type(error).__name__}"
        return "removed"

    def sabotage(self) -> None:
        """Records are believed."""
        siamese_deploy.cache_file.Row.is_sound = lambda row, n_bytes: (
            isinstance(row.vector, bytes) and len(row.vector) == n_bytes
        )
