"""root/<class>/<image> -> ImageFolder. Looks at names only; no picture is opened here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import EnvironmentFault, InputDataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that was left out, and why. `path` is relative to the root."""

    path: str
    reason: str
    code: str
    """As of a SiameseError."""


@dataclass(frozen=True)
class ImageFolder:
    """The pictures below one root, in an order that depends on nothing but their names."""

    root: Path
    paths: tuple[str, ...]
    """(n_images,) POSIX paths relative to `root`, sorted as bytes."""
    labels: npt.NDArray[np.int64]
    """(n_images,) index into `class_names`."""
    class_names: tuple[str, ...]
    """(n_classes,) folder names, sorted as bytes; every one has at least one picture."""
    skipped: tuple[SkippedFile, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """SHA-256 (hex) of the paths and of the files' sizes in bytes."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                size = (self.root / path).stat().st_size
            except OSError:  # gone since the scan; whoever opens it will say so
                size = -1
            digest.update(os.fsencode(path) + b"\0%d\0" % size)
        return digest.hexdigest()

    def require_still_there(self) -> None:
        """After a picture could not be read: one more to skip, or is the whole disk gone?

        Raises:
            EnvironmentFault: none of the class folders is there any more.
        """
        if not any(os.path.isdir(self.root / name) for name in self.class_names):
            raise EnvironmentFault(
                f"{self.root}: its folders are gone; was the disk unplugged or unmounted?", code="folder-gone"
            )

    def absolute_path(self, image: int) -> Path:
        return self.root / self.paths[image]

    def class_name(self, image: int) -> str:
        return self.class_names[int(self.labels[image])]


def scan_image_folder(root: str | os.PathLike[str]) -> ImageFolder:
    """List the pictures in root/<class>/; hidden files and files that are no pictures by name are ignored.

    Links are followed. What should have been usable but is not (broken link, folder without permission, class without
    a picture) is listed in `skipped`.

    Raises:
        InputDataError: the root is missing, a file, or holds no class folder with a picture.
        EnvironmentFault: the root may not be read.
    """
    root = Path(root)
    if not root.exists():
        raise InputDataError(f"{root}: no such folder", code="not-found")
    if not root.is_dir():
        raise InputDataError(f"{root}: is a file; expected a folder with one sub-folder per class", code="not-a-folder")
    try:
        entries = _visible_entries(root)
    except PermissionError as error:
        raise EnvironmentFault(f"{root}: no permission to read this folder", code="permission") from error
    paths: list[str] = []
    skipped: list[SkippedFile] = []
    for entry in entries:
        # os.path, unlike DirEntry, answers False for a link in a loop or into a folder without permission.
        if not os.path.isdir(entry.path):
            if entry.is_symlink() and not os.path.exists(entry.path):
                skipped.append(SkippedFile(entry.name, "broken link", code="broken-link"))
            continue
        try:
            files = _visible_entries(Path(entry.path))
        except OSError as error:
            skipped.append(SkippedFile(entry.name, f"folder cannot be read ({error.strerror})", code="unread-folder"))
            continue
        n_before = len(paths)
        for file in files:
            path = f"{entry.name}/{file.name}"
            if not file.name.lower().endswith(IMAGE_EXTENSIONS):
                continue
            if os.path.isfile(file.path):
                paths.append(path)
            else:
                skipped.append(
                    SkippedFile(path, "not a regular file", code="not-a-file")
                    if os.path.exists(file.path)
                    else SkippedFile(path, "broken link", code="broken-link")
                )
        if len(paths) == n_before:
            skipped.append(SkippedFile(entry.name, "class folder without a picture", code="empty-class"))
    if not paths:
        raise InputDataError(_why_empty(root, entries), code="no-pictures")
    return image_folder_of(root, paths, tuple(skipped))


def image_folder_of(root: Path, paths: Iterable[str], skipped: tuple[SkippedFile, ...] = ()) -> ImageFolder:
    """The pictures at these POSIX paths relative to `root`; the class of each is its folder ("." for the root)."""
    ordered = sorted(paths, key=os.fsencode)
    classes = [path.rpartition("/")[0] or "." for path in ordered]
    class_names = sorted(set(classes), key=os.fsencode)
    index = {name: i for i, name in enumerate(class_names)}
    labels = np.array([index[name] for name in classes], dtype=np.int64)
    return ImageFolder(root, tuple(ordered), labels, tuple(class_names), skipped)


HIDDEN = (".", "@eaDir", "__MACOSX")
"""Names that begin so are what file managers, cameras and archives leave behind."""


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of one folder without what file managers, cameras and archives leave behind."""
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(HIDDEN)]


def _why_empty(root: Path, entries: list[os.DirEntry[str]]) -> str:
    layout = f"expected {root}/<class>/<image> with one of {' '.join(IMAGE_EXTENSIONS)}"
    in_root = sum(e.name.lower().endswith(IMAGE_EXTENSIONS) and os.path.isfile(e.path) for e in entries)
    if in_root:
        return f"{root}: {in_root} pictures lie directly in the folder; {layout}"
    folders = [e for e in entries if os.path.isdir(e.path)]
    nested = [e for e in folders if any(os.path.isdir(inner.path) for inner in _visible_entries(Path(e.path)))]
    if len(folders) == len(nested) == 1:
        return f"{root}: no pictures in its sub-folders; did you mean {root}/{nested[0].name}? {layout}"
    return f"{root}: no pictures in {len(folders)} sub-folders; {layout}"
