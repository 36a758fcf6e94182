"""A file that lists pairs -> ImageFolder and Pairs: our CSV, or pairs.txt of Labeled Faces in the Wild (LFW).

Every error names the file and the line. Pictures are looked up, not opened.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import EnvironmentFault, InputDataError, UsageError
from siamese_deploy.image_folder import IMAGE_EXTENSIONS, ImageFolder, image_folder_of
from siamese_deploy.pairs import Integers, Pairs
from siamese_deploy.table_files import open_text

_IS_SAME = {
    "1": True, "true": True, "same": True, "yes": True,
    "0": False, "false": False, "different": False, "no": False,
}  # fmt: skip
# Two of the longest paths there are, quoted, and more; a file of another kind is one endless line.
_MAX_LINE = 2**16
_HEADER = "expected a header row with left, right and label (or is_same), separated by commas"
_LFW_HEADER = "expected the number of folds and of pairs of a kind in a fold (such as 10 300), or the latter only"


def read_pair_list(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> tuple[ImageFolder, Pairs]:
    """Read a list of pairs of pictures below `root`; a picture's class is the folder it lies in ("." for the root).

    NAME.csv has a header row and the columns left, right (paths relative to `root`, with slashes) and label (or
    is_same: 1/0, true/false, same/different or yes/no), in any order; other columns are ignored. In a list that was
    scored (with a column score) a pair may come again the other way round, as in `sample_pairs`. File names that are
    not UTF-8 stand as the bytes they are.

    NAME.txt is LFW's pairs.txt: each picture is name/name_0001 with one of IMAGE_EXTENSIONS; the pairs have a `fold`.

    Reads line by line; a pair costs about 50 bytes, a picture its path.

    Returns:
        The folder of the pictures in the list, and the pairs in the file's order.

    Raises:
        UsageError: the name ends in neither .csv nor .txt.
        InputDataError: no such file or root; no pairs; a line that is not as described, a picture that is not there or
            that is paired with itself, a pair that was there before, either way round.
        EnvironmentFault: the file, or a folder of a picture, may not be read.
    """
    file, root = Path(file), Path(root)
    kind = file.suffix.lower()
    if kind not in (".csv", ".txt"):
        raise UsageError(
            f"{file}: expected reference, all, or a list of pairs with a name that ends in .csv, or .txt for LFW's "
            "pairs.txt"
        )
    if not root.is_dir():
        what = "is a file; expected the folder that the paths in the list start from"
        raise InputDataError(f"{root}: {what if root.exists() else 'no such folder'}", code="not-found")
    listed = _ListedPairs(file, root)
    with open_text(file, "a list of pairs") as text:
        if kind == ".csv":
            _read_csv(listed, text)
        else:
            _read_lfw(listed, text)
    return listed.finished()


def _lines(file: Path, text: TextIO) -> Iterator[str]:
    number = 0
    while line := text.readline(_MAX_LINE):
        number += 1
        if "\0" in line:
            raise InputDataError(f"{file}, line {number}: a NUL byte; expected text in UTF-8", code="pair-list")
        if len(line) == _MAX_LINE:
            raise InputDataError(
                f"{file}, line {number}: longer than {_MAX_LINE:,} characters; expected a list of pairs",
                code="pair-list",
            )
        yield line


def _read_csv(listed: _ListedPairs, text: TextIO) -> None:
    reader = csv.reader(_lines(listed.file, text), strict=True)
    columns: tuple[int, int, int] | None = None
    width = 0
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise listed.error(line, f"not CSV ({error})") from error
        if record is None:
            break
        if not record:  # an empty line
            continue
        if columns is None:
            columns, width = _columns(listed, line, record), len(record)
            continue
        if len(record) != width:
            raise listed.error(line, f"expected {width} columns, as in the header, got {len(record)}")
        left, right, label = (record[column] for column in columns)
        is_same = _IS_SAME.get(label.strip().lower())
        if is_same is None:
            raise listed.error(
                line, f"label {_shown(label)}: expected 1 or 0, true or false, same or different, yes or no"
            )
        listed.add(line, listed.picture(line, left), listed.picture(line, right), is_same)
    if columns is None:
        raise InputDataError(f"{listed.file}: is empty; {_HEADER}", code="pair-list")


def _columns(listed: _ListedPairs, line: int, header: list[str]) -> tuple[int, int, int]:
    """Where left, right and the label are."""
    names = [name.strip().lower() for name in header]
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise listed.error(line, f"columns separated by {word}; {_HEADER}")
    found = ", ".join(_shown(name) for name in header[:8])
    labels = [name for name in names if name in ("label", "is_same")]
    for name, count in (("left", names.count("left")), ("right", names.count("right")), ("label", len(labels))):
        if count != 1:
            what = f"no column {name}" if count == 0 else f"{count} columns {name}"
            raise listed.error(line, f"{what}, found {found}; {_HEADER}")
    listed.either_way = "score" in names
    return names.index("left"), names.index("right"), names.index(labels[0])


def _read_lfw(listed: _ListedPairs, text: TextIO) -> None:
    lines = ((number, line) for number, line in enumerate(_lines(listed.file, text), 1) if line.strip())
    line, header = next(lines, (0, ""))
    if not line:
        raise InputDataError(f"{listed.file}: is empty; {_LFW_HEADER}", code="pair-list")
    sizes = header.split()
    if not 1 <= len(sizes) <= 2 or not all(re.fullmatch("[0-9]{1,9}", size) and int(size) for size in sizes):
        hint = "; a list with the columns left, right and label needs a name that ends in .csv" if "," in header else ""
        raise listed.error(line, f"{_LFW_HEADER}{hint}")
    n = int(sizes[-1])
    total = 2 * n * (int(sizes[0]) if len(sizes) == 2 else 1)
    announced = f"the first line announces {total:,}"
    count = 0
    for count, (line, text_of_pair) in enumerate(lines, 1):
        if count > total:
            raise listed.error(line, f"more pairs than there should be; {announced}")
        fold, place = divmod(count - 1, 2 * n)
        text_of_pair = text_of_pair.strip()
        fields = [part.strip() for part in text_of_pair.split("\t" if "\t" in text_of_pair else None)]
        _add_lfw_pair(listed, line, fields, is_same=place < n, fold=fold)
    if count < total:
        raise listed.error(line, f"ends after {count:,} pairs; {announced}")


def _add_lfw_pair(listed: _ListedPairs, line: int, fields: list[str], *, is_same: bool, fold: int) -> None:
    form = "name, number, number" if is_same else "name, number, name, number"
    if len(fields) != (3 if is_same else 4) or not all(re.fullmatch("[0-9]{1,9}", fields[k]) for k in (1, -1)):
        kind = "the same name" if is_same else "different names"
        raise listed.error(line, f"expected a pair of {kind} here ({form}), got {_shown(' '.join(fields))}")
    names = (fields[0], fields[-2] if not is_same else fields[0])
    if not is_same and names[0] == names[1]:
        raise listed.error(line, f"both pictures are of {names[0]}; expected a pair of different names here")
    for name in names:
        if "/" in name or name in ("", ".", ".."):
            raise listed.error(line, f"{_shown(name)} is no name of a folder")
    left, right = (
        listed.picture_with_any_extension(line, f"{name}/{name}_{int(number):04d}")
        for name, number in zip(names, (fields[1], fields[-1]), strict=True)
    )
    listed.add(line, left, right, is_same, fold)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")


@dataclass
class _ListedPairs:
    """The rows so far; pictures are numbered as they come."""

    file: Path
    root: Path
    numbers: dict[str, int] = field(default_factory=dict)
    """Path as it stands in the file -> number of the picture."""
    pictures: dict[str, int] = field(default_factory=dict)
    """Path relative to the root -> number of the picture, in the order of the numbers."""
    left: array[int] = field(default_factory=lambda: array("i"))
    right: array[int] = field(default_factory=lambda: array("i"))
    line: array[int] = field(default_factory=lambda: array("i"))
    fold: array[int] = field(default_factory=lambda: array("i"))
    is_same: bytearray = field(default_factory=bytearray)
    either_way: bool = False
    """The same pair may come once more the other way round, as in the reference's scheme."""

    def error(self, line: int, what: str) -> InputDataError:
        return InputDataError(f"{self.file}, line {line}: {what}", code="pair-list")

    def add(self, line: int, left: int, right: int, is_same: bool, fold: int | None = None) -> None:
        if left == right:
            raise self.error(line, f"{list(self.pictures)[left]} is paired with itself")
        self.left.append(left)
        self.right.append(right)
        self.line.append(line)
        self.is_same.append(is_same)
        if fold is not None:
            self.fold.append(fold)

    def picture(self, line: int, text: str) -> int:
        """Number of the picture at this path."""
        number = self.numbers.get(text)
        return self._number(line, text, lambda: self._checked(line, text)) if number is None else number

    def picture_with_any_extension(self, line: int, text: str) -> int:
        """Number of the picture at this path and the first of IMAGE_EXTENSIONS that is there."""

        def find() -> str:
            for extension in IMAGE_EXTENSIONS:
                for path in (text + extension, text + extension.upper()):
                    if self._is_file(line, path):
                        return path
            raise self.error(line, f"no picture {text} with one of {' '.join(IMAGE_EXTENSIONS)} in {self.root}")

        number = self.numbers.get(text)
        return self._number(line, text, find) if number is None else number

    def _number(self, line: int, text: str, path_of: Callable[[], str]) -> int:
        self.numbers[text] = self.pictures.setdefault(path_of(), len(self.pictures))
        return self.numbers[text]

    def _checked(self, line: int, text: str) -> str:
        """The path without "./" and the like, if there is a picture."""
        parts = text.split("/")
        if text.startswith("/"):
            raise self.error(line, f"{_shown(text)}: an absolute path; expected one relative to {self.root}")
        if ".." in parts:
            raise self.error(
                line, f"{_shown(text)}: leads out of a folder; expected a path below {self.root}, without .."
            )
        path = "/".join(part for part in parts if part not in ("", "."))
        if not path:
            raise self.error(line, f"no path of a picture, got {_shown(text)}")
        if self._is_file(line, path):
            return path
        hint = ""
        if "\\" in path and self._is_file(line, path.replace("\\", "/")):
            hint = "; it is there with / for \\: write paths with slashes"
        elif path != path.strip() and self._is_file(line, path.strip()):
            hint = "; it is there without the spaces around the name"
        raise self.error(line, f"no picture {_shown(text)} in {self.root}{hint}")

    def _is_file(self, line: int, path: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(os.path.join(self.root, path)).st_mode)
        except PermissionError as error:
            raise EnvironmentFault(
                f"{self.file}, line {line}: no permission to look for {path} in {self.root}", code="permission"
            ) from error
        except (OSError, ValueError):  # ValueError: no name that this system can have
            return False

    def finished(self) -> tuple[ImageFolder, Pairs]:
        if not self.left:
            raise InputDataError(f"{self.file}: no pairs, only a header row", code="pair-list")
        folder = image_folder_of(self.root, self.pictures)
        index = np.empty(len(folder), dtype=np.int64)
        index[[self.pictures[path] for path in folder.paths]] = np.arange(len(folder))
        left, right = (index[np.frombuffer(side, dtype=np.intc)] for side in (self.left, self.right))
        is_same = np.frombuffer(self.is_same, dtype=np.bool_)
        self._refuse_duplicates(folder, left, right)
        self._refuse_contradictions(folder, left, right, is_same)
        fold = np.frombuffer(self.fold, dtype=np.intc).astype(np.int64) if self.fold else None
        return folder, Pairs(left, right, is_same, fold)

    def _refuse_duplicates(self, folder: ImageFolder, left: Integers, right: Integers) -> None:
        one, other = (left, right) if self.either_way else (np.minimum(left, right), np.maximum(left, right))
        key = one * len(folder) + other
        order = np.argsort(key, kind="stable")  # so that of equal ones the earlier line comes first
        again = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        if len(again):
            first = again[np.argmin(order[again + 1])]
            before, line = self.line[order[first]], self.line[order[first + 1]]
            names = f"{folder.paths[left[order[first]]]} and {folder.paths[right[order[first]]]}"
            raise self.error(line, f"the pair of {names} is on line {before} already; remove one of them")

    def _refuse_contradictions(
        self, folder: ImageFolder, left: Integers, right: Integers, is_same: npt.NDArray[np.bool_]
    ) -> None:
        """A pair may be there once each way round, but not as same and as different."""
        key = np.minimum(left, right) * len(folder) + np.maximum(left, right)
        order = np.argsort(key, kind="stable")
        at_odds = np.flatnonzero((np.diff(key[order]) == 0) & (is_same[order[1:]] != is_same[order[:-1]]))
        if len(at_odds):
            before, again = order[at_odds[0]], order[at_odds[0] + 1]
            names = f"{folder.paths[left[before]]} and {folder.paths[right[before]]}"
            raise self.error(self.line[again], f"{names} have the other label on line {self.line[before]}")
