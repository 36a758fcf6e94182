"""Embeddings of pictures seen before, on disk: the same picture, model and pre-processing are embedded once.

A record is found by content alone (`embedding_key`), carries a checksum that binds it to its key, and may be lost at
any time: that costs one run of the network. So whatever goes wrong here is a miss, and never an error of the caller's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from PIL import features

from siamese_deploy.cache_file import (
    FILE_NAME,
    PATIENCE_S,
    Row,
    default_cache_folder,
    evict,
    insert,
    note_use,
    one,
    opened,
    select,
    shrink_file,
)
from siamese_deploy.errors import BusyError, EnvironmentFault, SiameseError, code_of, one_line
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.private_folder import private_folder
from siamese_deploy.verifier import Embeddings

DEFAULT_MAX_BYTES = 512 * 2**20
"""About 125,000 embeddings of 1000 numbers."""

_IMPATIENCE_S = 0.1
_KEPT_OF_CAP = 0.9  # so that not every record that is added evicts one
_ROWS_IN_TRANSACTION = 512


def embedding_key(
    picture_sha256: bytes,
    *,
    model_digest: str,
    backend: str,
    provider: str,
    runtime_version: str,
    preprocess: Preprocess,
) -> bytes:
    """32 bytes that name an embedding by all that decides its numbers.

    Args:
        picture_sha256: of the picture file's bytes.
        model_digest, backend, provider, runtime_version, preprocess: of the `Verifier`.
    """
    content = {
        "format": "siamese-embedding/1",
        "picture": picture_sha256.hex(),
        "model": model_digest,
        "backend": backend,
        "provider": provider,
        "runtime": runtime_version,
        "preprocess": preprocess.to_json(),
        "decoders": _decoder_versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).digest()


@lru_cache
def _decoder_versions() -> tuple[str | None, ...]:
    # Of the lossy formats, where another library may give other pixels.
    return (PIL.__version__, *(features.version(name) for name in ("jpg", "libjpeg_turbo", "webp")))


@dataclass(frozen=True)
class CacheStat:
    path: Path
    records: int
    file_bytes: int
    journal_mode: str
    """SQLite's."""


class EmbeddingCache:
    """Embeddings in one SQLite file of a private folder; for several threads and processes at once.

    `get_many` and `put_many` raise no error of the file's: it ends the use of the cache in this process and is told in
    `warning`. A file that another process keeps locked costs that one operation.

    Args:
        folder: made with mode 0700 if it is missing.
        max_bytes: size of the file from which on the least recently used records are dropped.

    Raises:
        UsageError: `folder` is a file.
        EnvironmentFault: `folder` cannot be written, belongs to somebody else, or others may write into it.
        IntegrityError: the file there is another application's, of another format, damaged, or has a second name.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.path = Path(os.path.abspath(folder), FILE_NAME)
        self.max_bytes = max_bytes
        self.hits = self.misses = self.damaged = 0
        self.warning = ""
        """Why this process has stopped using the cache, in one line; "" as long as it has not."""
        self._patience_s = PATIENCE_S
        try:
            private_folder(self.path.parent)
            with opened(self.path, self._patience_s):
                pass
        except BusyError:  # may be over by the time it is needed
            pass
        except OSError as error:
            reason = f"{error.filename or folder}: {error.strerror}"
            raise EnvironmentFault(
                f"{reason}; choose another folder with --cache DIR, or --no_cache", code=code_of(error, "environment")
            ) from error

    def get_many(self, keys: Sequence[bytes], dim: int) -> dict[bytes, Embeddings]:
        """Those of the keys that are known, each with its vector: (dim,) float32, finite.

        A record that does not fit its checksum, or `dim`, is removed, counted in `damaged`, and a miss.
        """
        found: dict[bytes, Embeddings] = {}
        if keys and not self.warning:
            with self._failures_noted(), opened(self.path, self._patience_s) as connection:
                rows = select(connection, list(dict.fromkeys(keys)))
                sound, vectors = _sound(rows, dim)
                found = {row.key: vector for row, vector in zip(sound, vectors, strict=True)}
                damaged = {row.id for row in rows} - {row.id for row in sound}
                self.damaged += len(damaged)
                note_use(connection, [row.id for row in sound], damaged)
        hits = sum(key in found for key in keys)
        self.hits += hits
        self.misses += len(keys) - hits
        return found

    def put_many(self, keys: Sequence[bytes], vectors: Embeddings) -> None:
        """Keep (n, dim) float32, one row a key; rows that are not finite are left out.

        Every call waits for the disk: some milliseconds, for many rows as for few.
        """
        vectors = np.asarray(vectors, "<f4")
        kept = np.flatnonzero(np.isfinite(vectors).all(axis=1)).tolist()
        rows = [(keys[row], vectors[row].tobytes()) for row in kept]
        if not rows or self.warning:
            return
        with self._failures_noted(), opened(self.path, self._patience_s) as connection:
            for start in range(0, len(rows), _ROWS_IN_TRANSACTION):
                connection.execute("BEGIN IMMEDIATE")
                insert(connection, rows[start : start + _ROWS_IN_TRANSACTION])
                evict(connection, self.max_bytes, int(_KEPT_OF_CAP * self.max_bytes))
                connection.execute("COMMIT")
                shrink_file(connection, self.max_bytes)

    def stat(self) -> CacheStat:
        """Raises:
        BusyError, IntegrityError, EnvironmentFault: the file cannot be read.
        """
        with opened(self.path, PATIENCE_S) as connection:
            records = one(connection, "SELECT count(*) FROM usage")
            file_bytes = one(connection, "PRAGMA page_count") * one(connection, "PRAGMA page_size")
            return CacheStat(self.path, records, file_bytes, one(connection, "PRAGMA journal_mode").decode())

    def prune(self, max_bytes: int) -> int:
        """Drop the least recently used records until the file has at most `max_bytes` (an empty one has 24 KiB).

        Returns:
            Number of records dropped.

        Raises:
            BusyError, IntegrityError, EnvironmentFault: the file cannot be written.
        """
        with opened(self.path, PATIENCE_S) as connection:
            connection.execute("BEGIN IMMEDIATE")
            dropped = evict(connection, max_bytes, max_bytes)
            connection.execute("COMMIT")
            shrink_file(connection, max_bytes)
        return dropped

    @contextmanager
    def _failures_noted(self) -> Iterator[None]:
        try:
            yield
            self._patience_s = PATIENCE_S
        except BusyError:
            # Who has held it for that long may do so for hours: do not wait as long again for every batch.
            self._patience_s = _IMPATIENCE_S
        except (SiameseError, OSError) as error:
            self.warning = one_line(f"embeddings are no longer cached: {error}")


def _sound(rows: list[Row], dim: int) -> tuple[list[Row], Embeddings]:
    """The rows that may be believed, and their vectors (n, dim) float32."""
    rows = [row for row in rows if row.is_sound(4 * dim)]
    vectors = np.frombuffer(b"".join(row.vector for row in rows), "<f4").reshape(len(rows), dim)
    finite = np.isfinite(vectors).all(axis=1)
    return [row for row, sound in zip(rows, finite, strict=True) if sound], vectors[finite].astype(np.float32)


def open_cache(folder: Path | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES) -> tuple[EmbeddingCache | None, str]:
    """The cache in `folder`, and ""; without a folder that in the default place or, where it cannot be used, None and
    the reason in one line.

    Raises:
        UsageError, EnvironmentFault, IntegrityError: as `EmbeddingCache`, of a folder that was named.
    """
    if folder is not None:
        return EmbeddingCache(folder, max_bytes=max_bytes), ""
    folder = default_cache_folder()
    if folder is None:
        return None, "embeddings are not cached: there is no home folder; name a folder with --cache DIR"
    try:
        return EmbeddingCache(folder, max_bytes=max_bytes), ""
    except SiameseError as error:
        return None, one_line(f"embeddings are not cached: {error}")
