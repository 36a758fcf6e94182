"""Which pictures of one or two folders are equal, or look alike, and what that means for training and evaluation."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from siamese_deploy.dataset_check.findings import Finding
from siamese_deploy.dataset_check.perceptual_hash import close_pairs
from siamese_deploy.dataset_check.picture_audit import PictureAudit

MAX_LISTED = 1000
"""Near duplicates of a kind that are listed, the most alike first; all are counted."""
_KINDS = ("near-leakage", "near-conflict", "near-duplicate")
_KEPT = 100 * MAX_LISTED


@dataclass(frozen=True)
class CheckedPicture:
    path: str
    """As shown in findings."""
    folder: int
    """0 the folder that is checked, 1 the other one."""
    class_name: str
    audit: PictureAudit


@dataclass(frozen=True)
class NearDuplicates:
    findings: list[Finding] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    """Number of pairs by code, those that are not listed included."""
    compared: int = 0
    """Pictures that have a perceptual hash; of equal pictures of one class only the first counts."""


def exact_duplicates(pictures: Iterable[CheckedPicture]) -> list[Finding]:
    """One finding for each group of pictures with the same pixels in two folders, in two classes or in one class."""
    groups = defaultdict(list)
    for picture in pictures:
        if not picture.audit.reason:
            groups[picture.audit.pixel_digest].append(picture)
    findings = []
    for group in groups.values():
        if len(group) == 1:
            continue
        if len({picture.folder for picture in group}) > 1:
            findings.append(_equal("leakage", group))
        for folder in (0, 1):
            inside = [picture for picture in group if picture.folder == folder]
            if len({picture.class_name for picture in inside}) > 1:
                findings.append(_equal("label-conflict", inside))
            elif len(inside) > 1:
                findings.append(_equal("duplicate", inside))
    return findings


def _equal(code: str, group: Sequence[CheckedPicture]) -> Finding:
    if len({os.path.realpath(picture.path) for picture in group}) == 1:
        message = "one file, by a link"
    elif len({picture.audit.file_digest for picture in group}) == 1:
        message = "the same file content"
    else:
        message = "the same pixels in different files"
    if len({picture.class_name for picture in group}) > 1 and code == "leakage":
        message += ", under different classes"
    return Finding(code, tuple(picture.path for picture in group), message)


def near_duplicates(pictures: Iterable[CheckedPicture], distance: int) -> NearDuplicates:
    """Pairs of pictures whose perceptual hashes differ in at most `distance` bits, equal pictures left out.

    Across folders and classes the pairs are listed; within a class, where most sets have many, they are counted.
    """
    first_of: dict[tuple[bytes, int, str], CheckedPicture] = {}
    for picture in pictures:
        if picture.audit.perceptual_hash is not None:
            first_of.setdefault((picture.audit.pixel_digest, picture.folder, picture.class_name), picture)
    compared = list(first_of.values())
    result = NearDuplicates(compared=len(compared))
    pixels = _numbered(picture.audit.pixel_digest for picture in compared)
    folders = np.array([picture.folder for picture in compared], dtype=np.int64)
    classes = _numbered((picture.folder, picture.class_name) for picture in compared)
    kept: dict[str, list[npt.NDArray[np.int64]]] = {code: [] for code in _KINDS[:2]}
    hashes = np.array([picture.audit.perceptual_hash for picture in compared], dtype=np.uint64)
    for left, right, bits in close_pairs(hashes, distance):
        across = folders[left] != folders[right]
        conflict = ~across & (classes[left] != classes[right])
        new = pixels[left] != pixels[right]
        for code, of_kind in zip(_KINDS, (across, conflict, ~across & ~conflict), strict=True):
            chosen = of_kind & new
            result.pairs[code] += int(chosen.sum())
            if code in kept and chosen.any():
                kept[code].append(np.stack([bits[chosen].astype(np.int64), left[chosen], right[chosen]], axis=1))
                if sum(map(len, kept[code])) > _KEPT:
                    kept[code] = [_closest(kept[code])]
    for code, rows in kept.items():
        result.findings.extend(_listed(code, compared, rows, result.pairs[code]))
    if within := result.pairs["near-duplicate"]:
        result.findings.append(Finding("near-duplicate", (), f"pairs that look alike within a class: {within:,}"))
    return result


def _listed(
    code: str, pictures: list[CheckedPicture], rows: list[npt.NDArray[np.int64]], total: int
) -> Iterable[Finding]:
    closest = _closest(rows) if rows else np.empty((0, 3), dtype=np.int64)
    for bits, left, right in closest.tolist():
        yield Finding(code, (pictures[left].path, pictures[right].path), f"look alike: {bits} of 64 bits differ")
    if total > len(closest):
        yield Finding(code, (), f"further pairs, not listed: {total - len(closest):,}")


def _closest(rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """(at most MAX_LISTED, 3) of bits, left, right: the fewest bits first, then in the order of the pictures."""
    joined = np.concatenate(rows)
    return joined[np.lexsort(joined.T[::-1])][:MAX_LISTED]


def _numbered(keys: Iterable[object]) -> npt.NDArray[np.int64]:
    """(n,) equal numbers for equal keys."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
