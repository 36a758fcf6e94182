"""A whole gallery at once: embedded again for another bundle, or written out for others."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from siamese_deploy.durable_files import folder_published_as
from siamese_deploy.embedding import embed_pictures
from siamese_deploy.errors import InputDataError, IntegrityError
from siamese_deploy.gallery.store import GalleryStore
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.preprocess import Picture
from siamese_deploy.runtime import OnnxVerifier


def reembed(folder: str | os.PathLike[str], verifier: OnnxVerifier, *, show_progress: bool = False) -> int:
    """Bind a gallery to another bundle: embed all pictures again from where they were enrolled. Returns their number.

    Nothing changes before all of them are embedded; then everything does in one moment. All embeddings are held in
    memory meanwhile.

    Raises:
        InputDataError: a source picture is gone or was changed.
        IntegrityError: a row is damaged.
        BusyError: the gallery was changed meanwhile.
    """
    store = GalleryStore(Path(folder))
    with store.snapshot() as snapshot:
        change, pictures = snapshot.rows.change, snapshot.pictures()
    damaged = [picture for picture in pictures if picture.damaged]
    if damaged:
        raise IntegrityError(
            f"{folder}: {len(damaged)} rows are damaged (first: {damaged[0].name}); remove them first",
            code="gallery-rows-damaged",
        )
    vectors, missing = [], []
    sources: list[Picture] = [picture.source for picture in pictures]
    with (
        interrupts_held() as let_interrupts_through,
        tqdm(total=len(pictures), desc="embedding", unit="image", disable=not show_progress) as progress,
    ):
        stored = iter(pictures)
        for batch in embed_pictures(verifier, sources, cache=verifier.cache):
            for item, picture in zip(batch, stored, strict=False):
                if item.vector is None or item.sha256 != picture.sha256:
                    missing.append(f"{picture.source or 'a picture that was no file'} ({picture.name})")
                else:
                    vectors.append(item.vector)
            progress.update(len(batch))
            let_interrupts_through()
    if missing:
        raise InputDataError(
            f"{folder}: {len(missing)} of {len(pictures)} source pictures are gone or changed (first: {missing[0]}); "
            "nothing was changed; put them back, or remove these identities",
            code="pictures-changed",
        )
    dim = verifier.embedding_dim
    store.replace_model(
        verifier.model_digest, change, pictures, np.stack(vectors) if vectors else np.empty((0, dim), np.float32)
    )
    return len(pictures)


def export_gallery(folder: str | os.PathLike[str], target: Path) -> int:
    """Write gallery.csv (row, name, source, sha256, enrolled_utc) and embeddings.npy, (n, dim) float32 in that order.

    Rows that are damaged are left out. Returns the number of rows written.

    Raises:
        UsageError: `target` exists.
    """
    store = GalleryStore(Path(folder))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("row", "name", "source", "sha256", "enrolled_utc"))
    with folder_published_as(target) as temporary, store.snapshot() as snapshot:
        slots = snapshot.rows.slots
        record = {picture.slot: picture for picture in snapshot.pictures()}
        shape = (sum(len(row) for row, _ in snapshot.sound_vectors()), snapshot.vectors.dim)
        with open(temporary / "embeddings.npy", "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            n_rows = 0
            for row, vectors in snapshot.sound_vectors():
                file.write(vectors.astype("<f4").tobytes())
                for slot in slots[row].tolist():
                    if slot not in record:
                        raise IntegrityError(
                            f"{folder}: damaged (its indexes disagree); restore it from a copy", code="gallery-damaged"
                        )
                    picture = record[slot]
                    values = (picture.name, picture.source, picture.sha256.hex(), picture.enrolled_utc)
                    writer.writerow((n_rows, *values))
                    n_rows += 1
        (temporary / "gallery.csv").write_bytes(table.getvalue().encode("utf-8", "surrogateescape"))
    return n_rows
