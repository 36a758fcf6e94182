"""A disk that loses power: from the calls a process made, every folder that could be found after a crash.

What POSIX and no more promises, and what file systems like ext4 have been seen to do (Pillai and others, "All file
systems are not created equal", OSDI 2014):

- a write or truncation is on the disk after an fsync of that file; before, any part of it may be, in any order;
- a name made, changed or removed is on the disk after an fsync of its folder; before, it may be or not, whatever else
  is, and an fsync of the file does not help;
- one rename or exchange happens wholly or not at all, but may be on the disk before the data of the file it moves;
- after a failed fsync, what was to be synced may be lost for good, whatever later fsyncs say (Rebello and others, "Can
  applications recover from fsync failures?", ATC 2020). Permissions are taken to be on the disk at once.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

SECTOR = 512
VARIANTS = (
    "unsynced lost",
    "unsynced kept",
    "last write torn",
    "names before data",
    "names before data, zeros instead",
    "data before names",
    "last name first",
    "last name lost",
)
"""Beside them, seeded draws in which each unsynced write and name is on the disk or not."""
_HEAD = struct.Struct("=IIQqII")


@dataclass(frozen=True)
class Operation:
    kind: str
    """c create, d make folder, w write, t truncate, s sync, x sync that failed, r rename, e exchange, u unlink, m mode,
    ! acknowledged."""
    inode: int
    value: int
    """Offset of a write, size, mode, or number of acknowledged steps."""
    data: bytes
    """What was written, or the path."""
    data2: bytes
    """The new path."""


def read_log(path: Path) -> list[Operation]:
    content, at, operations = path.read_bytes(), 0, []
    while at < len(content):
        kind, _, inode, value, n, n2 = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        operations.append(Operation(chr(kind), inode, value, content[at : at + n], content[at + n : at + n + n2]))
        at += n + n2
    return operations


@dataclass(eq=False)
class _Node:
    mode: int
    now: bytearray = field(default_factory=bytearray)
    """Content as the process sees it."""
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, data), or (size, None) for a truncation."""
    entries: dict[str, _Node] = field(default_factory=dict)
    durable_entries: dict[str, _Node] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


_Edit = tuple[_Node, str, _Node | None]
"""(folder, name, what it names from now on)."""

Image = dict[str, tuple[int, bytes | None]]
"""Relative path -> (mode, content; None for a folder)."""


class Disk:
    def __init__(self, root: Path) -> None:
        """All that is below `root` now, and taken to be on the disk."""
        self.root_path = root
        self.nodes: dict[int, _Node] = {}
        self.root = self._loaded(root)
        self.names: list[list[_Edit]] = []
        """Changes of names that are not yet on the disk; each list is one change."""
        self.last_written: _Node | None = None

    def _loaded(self, path: Path) -> _Node:
        status = path.lstat()
        node = _Node(status.st_mode)
        self.nodes[status.st_ino] = node
        if node.is_folder:
            node.entries = {name: self._loaded(path / name) for name in sorted(os.listdir(path))}
            node.durable_entries = dict(node.entries)
        else:
            node.now = bytearray(path.read_bytes())
            node.durable = bytearray(node.now)
        return node

    def _place(self, path: bytes) -> tuple[_Node, str]:
        parts = PurePosixPath(os.fsdecode(path)).relative_to(self.root_path).parts
        node = self.root
        for part in parts[:-1]:
            node = node.entries[part]
        return node, parts[-1]

    def _rename(self, *edits: _Edit) -> None:
        for folder, name, node in edits:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
        self.names.append(list(edits))

    def apply(self, operation: Operation) -> None:
        kind, node = operation.kind, self.nodes.get(operation.inode)
        if kind in "cd":
            node = self.nodes[operation.inode] = _Node(operation.value)
            self._rename((*self._place(operation.data), node))
        elif kind in "re":
            (source, old), (target, new) = self._place(operation.data), self._place(operation.data2)
            moved, there = source.entries[old], target.entries.get(new)
            self._rename((source, old, there if kind == "e" else None), (target, new, moved))
        elif kind == "u":
            self._rename((*self._place(operation.data), None))
        elif node is None:
            assert kind == "!", operation
        elif kind == "w":
            _write(node.now, operation.value, operation.data)
            node.unsynced.append((operation.value, operation.data))
            self.last_written = node
        elif kind == "t":
            _write(node.now, operation.value, None)
            node.unsynced.append((operation.value, None))
            self.last_written = node
        elif kind == "m":
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(operation.value)
        elif kind == "x":
            node.unsynced.clear()
        elif kind == "s" and node.is_folder:
            self._sync_names(node)
        elif kind == "s":
            for offset, data in node.unsynced:
                _write(node.durable, offset, data)
            node.unsynced.clear()

    def _sync_names(self, folder: _Node) -> None:
        for change in self.names:
            for edit in change:
                if edit[0] is folder:
                    _apply(folder.durable_entries, edit)
        self.names = [left for change in self.names if (left := [edit for edit in change if edit[0] is not folder])]

    def crashes(self, draws: int, seed: int) -> Iterator[tuple[str, Image]]:
        """What may be found if the power goes now: (variant, folder)."""
        every = range(len(self.names))
        last = every[-1:]
        yield "unsynced lost", self._image([], _durable)
        yield "unsynced kept", self._image(every, _kept)
        yield "last write torn", self._image(every, self._torn)
        yield "names before data", self._image(every, _durable)
        yield "names before data, zeros instead", self._image(every, _zeros)
        yield "data before names", self._image([], _kept)
        yield "last name first", self._image(last, _durable)
        yield "last name lost", self._image(every[:-1], _kept)
        for draw in range(draws):
            chance = random.Random(seed * 1000 + draw)  # noqa: S311
            share = chance.choice((0.2, 0.5, 0.8, 0.95))
            names = [k for k in every if chance.random() < share]
            yield (
                f"draw {draw}",
                self._image(names, lambda node, chance=chance, share=share: _drawn(node, chance, share)),
            )

    def now(self) -> Image:
        """The folder as the process sees it."""
        return self._image(range(len(self.names)), _kept)

    def _image(self, names: object, content: object) -> Image:
        """The folder with these changes of names on the disk and each file's content by `content(node)`."""
        entries: dict[int, dict[str, _Node]] = {}

        def of(folder: _Node) -> dict[str, _Node]:
            return entries.setdefault(id(folder), dict(folder.durable_entries))

        for k in names:  # type: ignore[attr-defined]
            for edit in self.names[k]:
                _apply(of(edit[0]), edit)
        image: Image = {}

        def walk(folder: _Node, path: str) -> None:
            for name, node in sorted(of(folder).items()):
                image[path + name] = (stat.S_IMODE(node.mode), None if node.is_folder else bytes(content(node)))  # type: ignore[operator]
                if node.is_folder:
                    walk(node, f"{path}{name}/")

        walk(self.root, "")
        return image

    def _torn(self, node: _Node) -> bytes:
        if node is not self.last_written or not node.unsynced:
            return node.now
        *whole, (offset, data) = node.unsynced
        content = bytearray(node.durable)
        for write in whole:
            _write(content, *write)
        if data is not None:
            _write(content, offset, data[: len(data) // 2])
        return content


def _write(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    if data is not None:
        content[offset : offset + len(data)] = data


def _apply(entries: dict[str, _Node], edit: _Edit) -> None:
    _, name, node = edit
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _durable(node: _Node) -> bytes:
    return node.durable


def _kept(node: _Node) -> bytes:
    return node.now


def _zeros(node: _Node) -> bytes:
    """The file has its new size, and nothing has been written into what was allocated."""
    content = bytearray(node.durable)
    for offset, data in node.unsynced:
        _write(content, offset, data and bytes(len(data)))
    return content


def _drawn(node: _Node, chance: random.Random, share: float) -> bytes:
    content = bytearray(node.durable)
    for offset, data in node.unsynced:
        if data is None:
            if chance.random() < share:
                _write(content, offset, None)
            continue
        for start in range(0, len(data), SECTOR):
            if chance.random() < share:
                _write(content, offset + start, data[start : start + SECTOR])
    return content


def digest(image: Image) -> bytes:
    content = hashlib.blake2b()
    for path, (mode, data) in sorted(image.items()):
        content.update(repr((path, mode, data is None, len(data or b""))).encode() + (data or b""))
    return content.digest()


def write_image(image: Image, root: Path) -> None:
    """Make the folder `root` (missing or empty) what `image` says."""
    root.mkdir(mode=0o700, exist_ok=True)
    for path, (mode, data) in image.items():
        target = root / path
        if data is None:
            target.mkdir()
        else:
            target.write_bytes(data)
        target.chmod(mode)


def read_image(root: Path) -> Image:
    image: Image = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        image[name] = (stat.S_IMODE(status.st_mode), None if path.is_dir() else path.read_bytes())
    return image
