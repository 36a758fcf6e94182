"""The cheap part of `siamese check`, for training and evaluation to run and to tell of on one line."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict

from siamese_deploy.dataset_check.findings import KINDS, Finding, in_report_order
from siamese_deploy.dataset_check.folder_audit import class_findings, class_sizes, left_out
from siamese_deploy.errors import one_line
from siamese_deploy.image_folder import ImageFolder

QUICK_FILES = 50_000
QUICK_BYTES = 64 * 2**20
_SAMPLE_BYTES = 16 * 2**10


def quick_findings(folder: ImageFolder) -> list[Finding]:
    """The part that is cheap enough for every run: names, sizes, and files of equal size compared by their content.

    No picture is decoded. At most QUICK_FILES files are opened and about QUICK_BYTES read in full; where that is not
    enough, a finding `not-run` says so.
    """
    findings = [*left_out(folder), *class_findings(folder, class_sizes(folder)), *_quick_conflicts(folder)]
    return in_report_order(findings)


def quick_line(folder: ImageFolder) -> str | None:
    """`quick_findings` on one line for the terminal; None where there is nothing to say."""
    findings = quick_findings(folder)
    counts: dict[str, int] = defaultdict(int)
    for finding in findings:
        if finding.severity != "note":
            counts[finding.code] += 1
    if not counts:
        return None
    parts = [f"{KINDS[code].title} ({count:,})" for code, count in counts.items()]
    first = next(finding for finding in findings if finding.severity != "note")
    example = " = ".join(first.paths[:2])
    found = f"{'; '.join(parts)} (first: {example}: {first.message})"
    return one_line(f"data set: {found}; see: siamese check {folder.root}")


def _quick_conflicts(folder: ImageFolder) -> list[Finding]:
    """Files with the same content in two classes."""
    by_size = defaultdict(list)
    for image in range(len(folder)):
        try:
            by_size[os.stat(folder.absolute_path(image)).st_size].append(image)
        except OSError:  # gone since the scan: whoever decodes it says so
            continue
    opened = read = 0
    stopped = False
    findings = []
    for size, images in sorted(by_size.items()):
        if size == 0 or not _several_classes(folder, images):
            continue
        if opened + len(images) > QUICK_FILES:
            stopped = True
            break
        opened += len(images)
        for alike in _groups(folder, images, max(0, size - _SAMPLE_BYTES) // 2, _SAMPLE_BYTES):
            if size > _SAMPLE_BYTES and read + size * len(alike) > QUICK_BYTES:
                stopped = True
                continue
            read += size * len(alike)
            for equal in [alike] if size <= _SAMPLE_BYTES else _groups(folder, alike, 0, size):
                shown = tuple(str(folder.absolute_path(image)) for image in equal)
                findings.append(Finding("label-conflict", shown, "the same file content"))
    if stopped:
        findings.append(Finding("not-run", (), "too many files of equal size: not all were compared"))
    return findings


def _groups(folder: ImageFolder, images: list[int], start: int, length: int) -> list[list[int]]:
    """Pictures whose files are equal from byte `start` on, of those groups the ones with several classes."""
    groups = defaultdict(list)
    for image in images:
        try:
            with open(folder.absolute_path(image), "rb") as file:
                file.seek(start)
                groups[hashlib.sha256(file.read(length)).digest()].append(image)
        except OSError:
            continue
    return [group for group in groups.values() if _several_classes(folder, group)]


def _several_classes(folder: ImageFolder, images: list[int]) -> bool:
    return len(images) > 1 and len(set(folder.labels[images].tolist())) > 1
