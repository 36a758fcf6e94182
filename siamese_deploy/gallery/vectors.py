"""The flat file of a gallery's embeddings: slot k is the k-th (dim,) little-endian float32 vector."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from siamese_deploy.durable_files import fsync_path
from siamese_deploy.errors import EnvironmentFault, IntegrityError, code_of
from siamese_deploy.verifier import Embeddings


def new_vectors_name() -> str:
    return f"vectors-{uuid.uuid4().hex[:8]}.f32"


class VectorFile:
    """Vectors by slot, read in pieces: memory follows the piece, and a file cut short is not a crash."""

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.dim = dim

    def __enter__(self) -> VectorFile:
        self._descriptor = _opened(self.path, os.O_RDONLY) if os.path.lexists(self.path) else -1
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, first_slot: int, into: Embeddings) -> None:
        """Fill `into`, (n, dim) float32, from slot `first_slot` on; what the file does not have is zero."""
        view = memoryview(into.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        done = 0
        while self._descriptor >= 0 and done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], first_slot * self.dim * 4 + done)
            if count == 0:
                break
            done += count
        into.reshape(-1).view(np.uint8)[done:] = 0

    def read_each(self, slots: Sequence[int], into: Embeddings) -> None:
        """Fill `into`, (n, dim) float32, from these slots; what the file does not have is zero."""
        size = self.dim * 4
        view = memoryview(into.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        for k, slot in enumerate(slots):
            piece = view[k * size : (k + 1) * size]
            if self._descriptor < 0 or os.preadv(self._descriptor, [piece], slot * size) != size:
                self.read(slot, into[k : k + 1])

    def checksum(self, slot: int) -> int:
        """Of one vector, as SQLite keeps it (signed)."""
        vector = np.empty((1, self.dim), np.float32)
        self.read(slot, vector)
        return int(checksums(vector)[0].view(np.int64))


def write_slots(path: Path, slots: Sequence[int], vectors: Embeddings) -> None:
    """Write (n, dim) float32 vectors to their slots (ascending), and wait until they are on the disk.

    Raises:
        EnvironmentFault: disk full and the like.
        IntegrityError: `path` is no plain file.
    """
    if not len(slots):
        return
    descriptor = _opened(path, os.O_WRONLY | os.O_CREAT)
    try:
        start = 0
        while start < len(slots):  # neighbours in one write
            end = start + 1
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            data = memoryview(np.ascontiguousarray(vectors[start:end], "<f4").tobytes())
            offset = slots[start] * vectors.shape[1] * 4
            while len(data):
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written
            start = end
        os.fsync(descriptor)
        fsync_path(path.parent)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: {error.strerror}; nothing was enrolled or changed by this step",
            code=code_of(error, "environment"),
        ) from error
    finally:
        os.close(descriptor)


def cut_behind(path: Path, size_bytes: int) -> None:
    """Make the file no longer than that."""
    if path.exists() and path.stat().st_size > size_bytes:
        descriptor = _opened(path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, size_bytes)
        finally:
            os.close(descriptor)


def _opened(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise IntegrityError(
                f"{path}: is a link or a folder, expected a plain file; put the file back", code="gallery-damaged"
            ) from error
        raise EnvironmentFault(f"{path}: {error.strerror}", code=code_of(error, "environment")) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: expected a plain file; put the file back", code="gallery-damaged")
    return descriptor


def checksums(vectors: Embeddings) -> npt.NDArray[np.uint64]:
    """(n, dim) float32 -> (n,) uint64: the sum of the row's words, each times an odd number of its own, modulo 2^64.

    Multilinear hashing (Carter and Wegman, "Universal classes of hash functions", 1979) with a fixed key: it finds
    accidents, among them every change of a single word, at the speed of memory; against an attacker it is nothing.
    """
    words = vectors.view(np.uint64) if vectors.shape[1] % 2 == 0 else vectors.view(np.uint32).astype(np.uint64)
    odd = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
    sums: npt.NDArray[np.uint64] = np.einsum("ij,j->i", words, odd)
    return sums
