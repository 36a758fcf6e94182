"""The data set doctor: one folder of classes, or two that should share nothing, -> what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import Any

from tqdm import tqdm

from siamese_deploy.dataset_check.duplicates import CheckedPicture, NearDuplicates, exact_duplicates, near_duplicates
from siamese_deploy.dataset_check.findings import Finding, in_report_order
from siamese_deploy.dataset_check.folder_audit import class_findings, class_key, class_sizes, left_out, tree_findings
from siamese_deploy.dataset_check.perceptual_hash import perceptual_hasher
from siamese_deploy.dataset_check.picture_audit import PerceptualHash, PictureAudit, audit_picture
from siamese_deploy.errors import MissingExtraError, one_line
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.providers import usable_cores

NEAR_DISTANCE = 4
"""Of 64 bits; docs/check.md has the measurements behind it."""


@dataclass(frozen=True)
class CheckedFolder:
    folder: ImageFolder
    audits: tuple[PictureAudit, ...]
    """(n_images,) one for each of folder.paths."""

    def usable_by_class(self) -> dict[str, int]:
        return class_sizes(self.folder, (not audit.reason for audit in self.audits))

    def summary(self) -> dict[str, Any]:
        """Counts: pictures, usable ones, classes, and the smallest and largest number of usable ones in a class."""
        sizes = self.usable_by_class()
        used = [size for size in sizes.values() if size]
        return {
            "path": str(self.folder.root),
            "pictures": len(self.folder),
            "usable": sum(used),
            "classes": len(used),
            "smallest_class": min(used, default=0),
            "largest_class": max(used, default=0),
        }


@dataclass(frozen=True)
class DatasetReport:
    folders: tuple[CheckedFolder, ...]
    """The folder checked, and the one it was compared with, if any."""
    findings: tuple[Finding, ...]
    """In the order of findings.KINDS."""
    near: NearDuplicates | None
    """None: not looked for."""

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def exit_code(self, *, strict: bool = False) -> int:
        """11 where there is an error, or with `strict` a warning; else 0."""
        return 11 if self.count("error") or (strict and self.count("warning")) else 0


def check_dataset(
    root: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    near: int = NEAR_DISTANCE,
    show_progress: bool = False,
) -> DatasetReport:
    """Decode every picture and look for whatever spoils training or makes an evaluation better than it should be.

    Args:
        against: a second folder (validation, test) that should have neither pictures nor classes of the first.
        near: most bits of 64 in which the perceptual hashes of near duplicates differ; 0: do not look for them.

    Raises:
        InputDataError: one of the folders is missing, a file, or holds no class folder with a picture.
        EnvironmentFault: one of the folders may not be read.
    """
    scanned = [scan_image_folder(path) for path in (root, against) if path is not None]
    findings: list[Finding] = []
    if len(scanned) == 2 and os.path.samefile(scanned[0].root, scanned[1].root):
        shown = tuple(str(folder.root) for folder in scanned)
        findings.append(Finding("same-folder", shown, "both names are of one folder; checked once"))
        del scanned[1]
    hasher, why_not = _hasher(near)
    if why_not:
        findings.append(Finding("not-run", (), f"near duplicates were not looked for: {why_not}"))
    folders = tuple(_check(folder, hasher, show_progress) for folder in scanned)
    pictures = list(_pictures(folders))
    findings.extend(exact_duplicates(pictures))
    for checked in folders:
        findings.extend(_findings_of_one(checked))
    if len(folders) == 2:
        findings.extend(_shared_classes(folders[0].folder, folders[1].folder))
    found = near_duplicates(pictures, near) if hasher else None
    return DatasetReport(folders, tuple(in_report_order(chain(findings, found.findings if found else ()))), found)


def _hasher(near: int) -> tuple[PerceptualHash | None, str]:
    """The hash, or why near duplicates are not looked for."""
    if near == 0:
        return None, "switched off"
    try:
        return perceptual_hasher(), ""
    except MissingExtraError as error:
        return None, str(error)


def _check(folder: ImageFolder, hasher: PerceptualHash | None, show_progress: bool) -> CheckedFolder:
    paths = (os.fspath(folder.absolute_path(image)) for image in range(len(folder)))
    audits = []
    with (
        interrupts_held() as let_interrupts_through,
        ThreadPool(usable_cores()) as threads,
        tqdm(
            total=len(folder),
            desc=one_line(f"checking {folder.root.name}"),
            unit="image",
            disable=not show_progress,
        ) as progress,
    ):
        for audit in threads.imap(lambda path: audit_picture(path, hasher), paths):
            audits.append(audit)
            progress.update()
            let_interrupts_through()
    return CheckedFolder(folder, tuple(audits))


def _pictures(folders: Iterable[CheckedFolder]) -> Iterable[CheckedPicture]:
    for number, checked in enumerate(folders):
        for image, audit in enumerate(checked.audits):
            path = str(checked.folder.absolute_path(image))
            yield CheckedPicture(path, number, checked.folder.class_name(image), audit)


def _findings_of_one(checked: CheckedFolder) -> Iterable[Finding]:
    folder = checked.folder
    yield from left_out(folder)
    yield from class_findings(folder, checked.usable_by_class())
    yield from tree_findings(folder)
    for image, audit in enumerate(checked.audits):
        shown = (str(folder.absolute_path(image)),)
        if audit.reason:
            yield Finding("unreadable", shown, audit.reason)
        for code, message in audit.remarks:
            yield Finding(code, shown, message)


def _shared_classes(folder: ImageFolder, other: ImageFolder) -> Iterable[Finding]:
    named = {class_key(name): name for name in other.class_names}
    for name in folder.class_names:
        twin = named.get(class_key(name))
        if twin is not None:
            message = "the same name" if twin == name else "names that differ only in case, Unicode form or blanks"
            yield Finding("shared-class", (str(folder.root / name), str(other.root / twin)), message)
