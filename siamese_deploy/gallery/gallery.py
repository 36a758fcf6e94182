"""Who is it? Enrol pictures under names, verify one name (1:1), identify among all (1:N)."""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from siamese_deploy.embedding import EmbeddedPicture, embed_pictures, require_signal
from siamese_deploy.errors import ImageError, InputDataError, UsageError
from siamese_deploy.gallery.records import Group, Rows, StoredPicture
from siamese_deploy.gallery.search import SMALLEST_ROWS, Candidate, Shortcut, best_identities, score_likely_rows
from siamese_deploy.gallery.store import GalleryStore, Snapshot
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.preprocess import Picture, decode_image
from siamese_deploy.runtime import OnnxVerifier
from siamese_deploy.verifier import Embeddings, Scores

MAX_NAME = 128


@dataclass(frozen=True)
class Identification:
    candidates: tuple[Candidate, ...]
    """Best first; equal scores in the order of the names."""
    threshold: float
    margin: float | None
    """Score of the best less that of the second; None with fewer than two identities."""
    decision: str
    """ "match", "no match" (also of an empty gallery), or "ambiguous": the margin is not above the smallest allowed."""
    damaged: int
    """Rows of the gallery that were left out because they are not what was enrolled."""

    @property
    def name(self) -> str | None:
        """The identity, if there is a match."""
        return self.candidates[0].name if self.decision == "match" else None


@dataclass
class Enrolment:
    identities: int = 0
    """That got new pictures."""
    pictures: int = 0
    """New ones; those enrolled under the same name before are not counted."""
    skipped: list[SkippedFile] = field(default_factory=list)
    """Pictures that could not be read."""
    refused: list[SkippedFile] = field(default_factory=list)
    """Identities that were left as they are."""
    doubles: list[str] = field(default_factory=list)
    """New pictures that match somebody else at the threshold: who, and the score."""


class Gallery:
    """A folder of enrolled pictures, bound to the bundle that embedded them.

    Safe with several threads and processes on one folder. What `enrol` and `remove` have returned from is on the disk.

    Args:
        folder: the gallery; it is made for the owner alone (0700).
        verifier: the bundle; pictures seen before are taken from `verifier.cache`, if it has one.
        create: make the gallery if it is not there.
        device_bytes: on a GPU, how much of the gallery stays there between questions; the rest is sent each time.

    Raises:
        InputDataError: no such gallery, and `create` is False.
        IntegrityError: it was made with another bundle, is no gallery, or is damaged.
        BusyError, EnvironmentFault, UsageError: as `GalleryStore` and `private_folder`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        verifier: OnnxVerifier,
        *,
        create: bool = False,
        device_bytes: int = 2**30,
    ) -> None:
        self.store = (
            GalleryStore.create(Path(folder), verifier.model_digest, verifier.embedding_dim)
            if create
            else GalleryStore(Path(folder), verifier.model_digest)
        )
        self.verifier = verifier
        self._rows: Rows | None = None
        self._device_bytes = 0 if verifier.provider == "cpu" else device_bytes
        self._on_device: _OnDevice | None = None
        self._placing = threading.Lock()
        self._shortcut: Shortcut | None = None
        self._preparing = threading.Lock()

    def enrol(
        self, name: str, pictures: Sequence[Picture], *, add: bool = False, replace: bool = False, doubles: bool = True
    ) -> Enrolment:
        """Enrol pictures of one identity, all of them or none.

        Args:
            name: 1 to 128 printable characters.
            add: the identity may be enrolled already.
            replace: its earlier pictures go.
            doubles: look for somebody else whom the new pictures match; the head runs once over the gallery for each.

        Raises:
            UsageError: no valid name.
            InputDataError: none of the pictures can be read, one is enrolled under another name, or the identity is
                enrolled already and neither `add` nor `replace` is set.
        """
        enrolment = self._enrol([(name, list(pictures))], add, replace, doubles, show_progress=False)
        if enrolment.refused:
            refused = enrolment.refused[0]
            raise InputDataError(f"{name}: {refused.reason}", code=refused.code)
        return enrolment

    def enrol_folder(
        self,
        folder: ImageFolder,
        *,
        add: bool = False,
        replace: bool = False,
        doubles: bool = True,
        show_progress: bool = False,
    ) -> Enrolment:
        """Enrol every class of a folder as an identity; each identity is complete or not there, whenever it is stopped.

        Identities that cannot be enrolled are `refused` and the others go on. Pictures that are enrolled under the
        same name already are left alone, so a stopped run is simply started again.

        Raises:
            UsageError: a class has no valid name.
            InputDataError: not one picture can be read.
        """
        groups: dict[str, list[Picture]] = {name: [] for name in folder.class_names}
        for image in range(len(folder)):
            groups[folder.class_name(image)].append(folder.absolute_path(image))
        return self._enrol(list(groups.items()), add, replace, doubles, show_progress=show_progress)

    def _enrol(
        self,
        groups: list[tuple[str, list[Picture]]],
        add: bool,
        replace: bool,
        doubles: bool,
        *,
        show_progress: bool,
    ) -> Enrolment:
        for name, members in groups:
            check_name(name)
            if not members:
                raise UsageError(f"{name}: expected at least one picture to enrol")
        enrolment = Enrolment()
        pictures = [picture for _, members in groups for picture in members]
        waiting: list[EmbeddedPicture] = []
        ahead = iter(groups)
        name, members = next(ahead, ("", []))
        with (
            interrupts_held() as let_interrupts_through,
            tqdm(total=len(pictures), desc="enrolling", unit="image", disable=not show_progress) as progress,
        ):
            for batch in embed_pictures(self.verifier, pictures, cache=self.verifier.cache):
                waiting += batch
                complete: list[Group] = []
                while members and len(waiting) >= len(members):
                    complete += _group(name, waiting[: len(members)], enrolment)
                    waiting = waiting[len(members) :]
                    name, members = next(ahead, ("", []))
                self._commit(complete, add, replace, doubles, enrolment)
                progress.update(len(batch))
                let_interrupts_through()
        if pictures and len(enrolment.skipped) == len(pictures):
            first = enrolment.skipped[0]
            raise InputDataError(
                f"none of {len(pictures)} pictures can be read ({first.path}: {first.reason}, ...)", code="no-pictures"
            )
        return enrolment

    def _commit(self, groups: list[Group], add: bool, replace: bool, doubles: bool, enrolment: Enrolment) -> None:
        if not groups:
            return
        for group, outcome in zip(groups, self.store.enrol(groups, add=add, replace=replace), strict=True):
            if isinstance(outcome, SkippedFile):
                enrolment.refused.append(outcome)
                continue
            enrolment.identities += bool(outcome)
            enrolment.pictures += len(outcome)
            for k in outcome if doubles else ():
                other = self._double(group.name, group.vectors[k])
                if other:
                    picture = group.pictures[k].source or "a picture"
                    enrolment.doubles.append(f"{picture} ({group.name}) matches {other.name} with {other.score:.4f}")

    def _double(self, name: str, vector: Embeddings) -> Candidate | None:
        found = self._identification(vector, 2, "max", self.verifier.threshold, 0.0, fast=False).candidates
        others = [candidate for candidate in found if candidate.name != name]
        return others[0] if others and others[0].score >= self.verifier.threshold else None

    def remove(self, *names: str) -> int:
        """Remove identities, all of them or none; returns the number of their pictures.

        Raises:
            UsageError: one of them is no valid name.
            InputDataError: one of them is not enrolled.
        """
        return self.store.remove([check_name(name) for name in names])

    def identify(
        self,
        picture: Picture,
        *,
        top: int = 5,
        per_identity: str = "max",
        threshold: float | None = None,
        min_margin: float = 0.0,
        fast: bool = False,
    ) -> Identification:
        """Who of the gallery is on the picture: one backbone run, and the head over all rows.

        Args:
            top: number of candidates.
            per_identity: "max" or "mean" over the scores of an identity's pictures.
            threshold: in [0, 1]; default: the bundle's.
            min_margin: the best must be ahead of the second by more than this, else the answer is "ambiguous".
            fast: score only the rows that are likely to score high, in galleries of 32,768 rows and more. Every
                candidate is exactly what it is otherwise, but one may be missed, and then the next best stands in its
                place. The first such question after a change of the gallery reads all of it; 129 bytes a row are kept
                in memory.

        Raises:
            ImageError: the picture cannot be used.
            UsageError: an argument is out of range, or `fast` with "mean".
            IntegrityError: the network gives no finite embedding or score.
        """
        vector = self._embed(picture)
        return self._identification(vector, top, per_identity, threshold, min_margin, fast=fast)

    def verify(self, picture: Picture, name: str) -> Candidate:
        """The largest score of the picture with the pictures of one identity.

        Raises:
            InputDataError: the identity is not enrolled, or all its rows are damaged.
            ImageError, IntegrityError: as `identify`.
        """
        _, scores = self._score_rows(self._embed(picture), only=name)
        scores = scores[np.isfinite(scores)]
        if len(scores) == 0:
            raise InputDataError(
                f"{name}: no such identity in {self.store.folder}, or its rows are damaged", code="not-enrolled"
            )
        return Candidate(name, float(scores.max()), len(scores))

    def _embed(self, picture: Picture) -> Embeddings:
        for batch in embed_pictures(self.verifier, (picture,), cache=self.verifier.cache):
            for item in batch:
                if item.vector is not None:
                    require_signal(item.name, item.vector)
                    return item.vector
                raise ImageError(item.name, item.reason, item.code)
        raise AssertionError("one picture in, one out")

    def _identification(
        self,
        vector: Embeddings,
        top: int,
        per_identity: str,
        threshold: float | None,
        min_margin: float,
        *,
        fast: bool,
    ) -> Identification:
        threshold = self.verifier.threshold if threshold is None else threshold
        if not (top >= 1 and per_identity in ("max", "mean") and 0 <= threshold <= 1 and 0 <= min_margin <= 1):
            raise UsageError(
                "identify: expected top of at least 1, per_identity max or mean, threshold and min_margin from 0 to 1; "
                f"got {top}, {per_identity}, {threshold}, {min_margin}"
            )
        if fast and per_identity != "max":
            raise UsageError(f"identify: fast finds the largest score only, got per_identity {per_identity}")
        likely = self._score_likely_rows(vector, max(top, 2)) if fast else None
        if likely is None:
            rows, scores = self._score_rows(vector)
            damaged = int(np.isnan(scores).sum())
        else:
            rows, scores, damaged = likely
        damaged += rows.damaged
        best = best_identities(rows, scores, per_identity, max(top, 2))
        margin = best[0].score - best[1].score if len(best) > 1 else None
        if not (best and best[0].score >= threshold):
            decision = "no match"
        elif margin is not None and not margin > min_margin:
            decision = "ambiguous"
        else:
            decision = "match"
        return Identification(tuple(best[:top]), threshold, margin, decision, damaged)

    def _score_rows(self, query: Embeddings, only: str | None = None) -> tuple[Rows, Scores]:
        """Rows, and (n_rows,) float32 scores with NaN for rows whose vector is not the one enrolled."""
        with self.store.snapshot(self._rows) as snapshot:
            rows = self._rows = snapshot.rows
            scores = np.full(len(rows.slots), np.nan, np.float32)
            wanted = None
            if only is not None:
                wanted = rows.identities == (rows.names.index(only) if only in rows.names else -1)
            if only is None and self._device_bytes:
                on_device = self._placed(snapshot)
                asked = self.verifier.place(query[None])
                for row, placed in on_device.chunks:
                    scores[row] = self.verifier.score_placed(asked, placed)
                wanted = np.arange(len(scores)) >= on_device.n_rows
            for row, vectors in snapshot.sound_vectors(wanted):
                scores[row] = self.verifier.score(query[None], vectors)
        return rows, scores

    def _score_likely_rows(self, query: Embeddings, number: int) -> tuple[Rows, Scores, int] | None:
        """Rows, scores and damaged rows of `score_likely_rows`; None if all rows have to be scored."""
        with self.store.snapshot(self._rows) as snapshot:
            rows = self._rows = snapshot.rows
            if len(rows.slots) < SMALLEST_ROWS:
                return None
            with self._preparing:
                shortcut = self._shortcut
                if shortcut is None or shortcut.change != rows.change:
                    self._shortcut = None  # its memory first
                    self._shortcut = shortcut = Shortcut.of(snapshot)
            found = score_likely_rows(
                snapshot, shortcut, lambda vectors: self.verifier.score(query[None], vectors), number
            )
        return None if found is None else (rows, *found)

    def _placed(self, snapshot: Snapshot) -> _OnDevice:
        """The first rows, as many as fit into `device_bytes`, on the device."""
        with self._placing:
            on_device = self._on_device
            if on_device is None or on_device.change != snapshot.rows.change:
                self._on_device = on_device = None  # its memory first
                fitting = self._device_bytes // (4 * self.verifier.embedding_dim)
                wanted = np.arange(len(snapshot.rows.slots)) < fitting
                chunks = [(row, self.verifier.place(vectors)) for row, vectors in snapshot.sound_vectors(wanted)]
                self._on_device = on_device = _OnDevice(snapshot.rows.change, fitting, chunks)
        return on_device


@dataclass(frozen=True)
class _OnDevice:
    change: int
    n_rows: int
    """The first rows; those of them that are not in `chunks` are damaged."""
    chunks: list[tuple[npt.NDArray[np.int64], Any]]


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        UsageError: not 1 to 128 printable characters, or blank at an end.
    """
    if not (1 <= len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise UsageError(
            f"name {name[:40]!r}: expected 1 to {MAX_NAME} printable characters without blanks at the ends"
        )
    return name


def twins(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names that differ only in case or Unicode form, which a person may take for one."""
    seen: dict[str, str] = {}
    found = []
    for name in names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            found.append((seen[folded], name))
        seen.setdefault(folded, name)
    return found


def _group(name: str, items: list[EmbeddedPicture], enrolment: Enrolment) -> list[Group]:
    """The identity with those of its pictures that could be read, if any; the others are noted."""
    readable = [item for item in items if item.vector is not None]
    enrolment.skipped += [SkippedFile(item.name, item.reason, item.code) for item in items if item.vector is None]
    if not readable:
        return []
    for item in readable:
        if not item.sha256:  # of a Pillow image or an array: of its pixels
            rgb = decode_image(item.picture)
            item.sha256 = hashlib.sha256(b"RGB %d %d " % rgb.size + rgb.tobytes()).digest()
        if item.vector is not None:
            require_signal(item.name, item.vector)
    pictures = [StoredPicture(name, item.sha256, _source(item)) for item in readable]
    return [Group(name, pictures, np.stack([item.vector for item in readable if item.vector is not None]))]


def _source(item: EmbeddedPicture) -> str:
    return os.path.abspath(item.picture) if isinstance(item.picture, str | os.PathLike) else ""
