"""CSV files for people and their spreadsheets, and files that others may have put in our way."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from siamese_deploy.errors import EnvironmentFault, InputDataError


def csv_bytes(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    plain, quoted = (csv.writer(text, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for row in rows:  # Python up to 3.12 leaves a carriage return bare, which splits the row for every reader
        (quoted if any("\r" in field for field in row if isinstance(field, str)) else plain).writerow(row)
    # surrogateescape: names that are not UTF-8 come out as the bytes they are on the disk.
    return text.getvalue().encode("utf-8", "surrogateescape")


def harmless(path: str) -> str:
    """The path, with "./" before it where a spreadsheet would calculate it."""
    return f"./{path}" if path.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else path


def open_text(file: Path, expected: str) -> TextIO:
    """A text file of names: UTF-8 with or without a byte order mark, bytes that are not UTF-8 as surrogates.

    Args:
        expected: what it should be, for the error.

    Raises:
        InputDataError: missing, or no regular file (a pipe would block for ever).
        EnvironmentFault: no permission.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise InputDataError(f"{file}: not a regular file; expected {expected}", code="not-a-file")
        return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except PermissionError as error:
        raise EnvironmentFault(f"{file}: no permission to read this file", code="permission") from error
    except OSError as error:
        raise InputDataError(f"{file}: {error.strerror}; expected {expected}", code="not-found") from error
