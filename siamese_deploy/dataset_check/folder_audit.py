"""A data set by the names in it: what is not used, links, odd names, sizes of the classes. Nothing is decoded."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from siamese_deploy.dataset_check.file_content import HEAD_BYTES, content_format, unsupported_picture
from siamese_deploy.dataset_check.findings import Finding
from siamese_deploy.image_folder import HIDDEN, IMAGE_EXTENSIONS, ImageFolder

IMBALANCE_RATIO = 10
_LEFT_BEHIND = ("thumbs.db", "desktop.ini")


def left_out(folder: ImageFolder) -> list[Finding]:
    """What `scan_image_folder` expected to use and could not."""
    return [Finding(file.code, (_shown(folder, file.path),), file.reason) for file in folder.skipped]


def class_findings(folder: ImageFolder, sizes: Mapping[str, int]) -> list[Finding]:
    """Whether pairs can be made of classes with these numbers of usable pictures (0 included), and of which."""
    findings = []
    used = {name: size for name, size in sizes.items() if size}
    for name, size in sizes.items():
        if size == 0:
            findings.append(Finding("empty-class", (_shown(folder, name),), "none of its pictures can be used"))
        elif size == 1:
            findings.append(Finding("one-picture", (_shown(folder, name),), "one usable picture"))
    for twins in _twins(sizes):
        shown = tuple(_shown(folder, name) for name in twins)
        names = ", ".join(map(ascii, twins))  # composed and decomposed letters look the same otherwise
        findings.append(Finding("class-twins", shown, f"differ only in case, Unicode form or blanks: {names}"))
    if len(used) < 2:
        findings.append(Finding("one-class", (str(folder.root),), f"{len(used)} usable classes; two are needed"))
    if max(used.values(), default=0) < 2:
        findings.append(Finding("no-class-of-two", (str(folder.root),), "no class has two usable pictures"))
    return findings + _imbalance(folder, used)


def class_key(name: str) -> str:
    """Equal for names that differ only in case, Unicode form or blanks."""
    return unicodedata.normalize("NFKC", " ".join(name.casefold().split()))


def _twins(names: Iterable[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[class_key(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _imbalance(folder: ImageFolder, sizes: Mapping[str, int]) -> list[Finding]:
    """Against the median, so that one class with a single picture is not taken for a general imbalance."""
    if len(sizes) < 2:
        return []
    by_size = sorted(sizes, key=lambda name: sizes[name])
    median = sizes[by_size[(len(by_size) - 1) // 2]]
    largest, smallest = by_size[-1], next((name for name in by_size if sizes[name] > 1), by_size[-1])
    if sizes[largest] < IMBALANCE_RATIO * median and median < IMBALANCE_RATIO * sizes[smallest]:
        return []
    message = (
        f"the largest class ({largest}) has {sizes[largest]:,} usable pictures, the smallest ({by_size[0]}) "
        f"{sizes[by_size[0]]:,}, the median {median:,}"
    )
    return [Finding("imbalance", (str(folder.root),), message)]


def tree_findings(folder: ImageFolder) -> list[Finding]:
    """What lies there beside the pictures that are used. Reads the first bytes of files of unknown extension."""
    walk = _Walk(folder)
    walk.run()
    return walk.findings()


class _Walk:
    """One pass over the tree; no folder is entered twice, and none outside of the root below a class."""

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder
        self._root = os.path.realpath(folder.root)
        self._entered: set[tuple[int, int]] = set()
        self._found: list[Finding] = []
        self._in_root: list[str] = []
        self._hidden: list[str] = []
        self._deep: dict[str, int] = defaultdict(int)
        self._outside: dict[str, list[str]] = defaultdict(list)

    def run(self) -> None:
        waiting = [""]
        while waiting:
            inside = waiting.pop()
            path = os.path.join(self._folder.root, inside)
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in self._entered:
                    continue
                self._entered.add((status.st_dev, status.st_ino))
                with os.scandir(path) as entries:
                    ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                if inside.count("/"):  # of the class folders themselves the scan has told
                    self._add("unread-folder", inside, f"folder cannot be read ({error.strerror})")
                continue
            waiting += [name for entry in ordered if (name := self._look_at(entry, inside))]

    def _look_at(self, entry: os.DirEntry[str], inside: str) -> str | None:
        """The path, relative to the root, of a folder that is to be entered."""
        name = f"{inside}/{entry.name}" if inside else entry.name
        if entry.name.startswith(HIDDEN) or entry.name.lower() in _LEFT_BEHIND:
            self._hidden.append(name)
            return None
        if not entry.name.isprintable() or entry.name.startswith("-"):
            self._add("odd-name", name, _oddity(entry.name))
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:  # a broken link, or no permission: where it matters, the scan has told
            return None
        goes_out = entry.is_symlink() and self._goes_out(entry, name)
        if stat.S_ISDIR(mode):
            return None if goes_out and inside else name
        self._look_at_file(entry, name, mode)
        return None

    def _goes_out(self, link: os.DirEntry[str], name: str) -> bool:
        target = os.path.realpath(link.path)
        if (os.path.realpath(os.path.dirname(link.path)) + "/").startswith(target + "/"):
            self._add("link-loop", name, "leads to a folder that it lies in")
        elif not target.startswith(self._root.rstrip("/") + "/"):
            self._outside[os.path.dirname(name)].append(name)
            return True
        return False

    def _look_at_file(self, entry: os.DirEntry[str], name: str, mode: int) -> None:
        depth = name.count("/")
        if entry.name.lower().endswith(IMAGE_EXTENSIONS):
            if depth == 0 and not stat.S_ISREG(mode):
                self._add("not-a-file", name, "not a regular file")
            elif depth == 0:
                self._in_root.append(name)
            elif depth > 1:
                self._deep[os.path.dirname(name)] += 1
        elif depth < 2 and stat.S_ISREG(mode):
            head = _head(entry.path)
            if content := content_format(head):
                self._add("unknown-extension", name, f"a {content} picture by its content")
            elif kind := unsupported_picture(head):
                self._add("unsupported-format", name, f"looks like {kind}")

    def _add(self, code: str, name: str, message: str) -> None:
        self._found.append(Finding(code, (_shown(self._folder, name),), message))

    def findings(self) -> list[Finding]:
        if self._in_root:
            self._found.append(self._summary("in-root", self._in_root, "pictures directly in the folder"))
        if self._hidden:
            self._found.append(self._summary("hidden", self._hidden, "hidden files and folders"))
        for names in self._outside.values():
            self._found.append(self._summary("link-outside", names, "links out of the folder"))
        for inside, count in self._deep.items():
            self._add("too-deep", inside, f"pictures below the class folder: {count:,}")
        return self._found

    def _summary(self, code: str, names: list[str], what: str) -> Finding:
        return Finding(code, tuple(_shown(self._folder, name) for name in names), f"{what}: {len(names):,}")


def _oddity(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return "name begins with a dash" if name.isprintable() else "name has control or invisible characters"


def _head(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _shown(folder: ImageFolder, path: str) -> str:
    return str(folder.root / path)


def class_sizes(folder: ImageFolder, usable: Iterable[bool] | None = None) -> dict[str, int]:
    """Number of usable pictures (n_images,) by class, classes without one included; None: all are usable."""
    weights = None if usable is None else np.fromiter(usable, dtype=np.float64, count=len(folder))
    sizes = np.bincount(folder.labels, weights, minlength=len(folder.class_names))
    return dict(zip(folder.class_names, sizes.astype(int).tolist(), strict=True))
