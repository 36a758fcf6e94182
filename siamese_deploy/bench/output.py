"""The folder with bench.json, bench.md and bench.png."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from siamese_deploy.bench.tables import FORMAT
from siamese_deploy.durable_files import locked_folder, write_atomically
from siamese_deploy.errors import UsageError

FILES = ("bench.png", "bench.md", "bench.json")
"""bench.json comes last: who finds a new one finds the others new, too."""
_START_BYTES = 200


@contextmanager
def output_folder(path: Path) -> Iterator[Callable[[Mapping[str, bytes]], None]]:
    """Hold the folder `path` (made if missing); yields what writes the contents by name of file, each file atomically.

    Raises:
        UsageError: `path` is a file, or has files of these names that are no earlier benchmark.
        BusyError: another run writes into it.
    """
    with locked_folder(path):
        existing = [name for name in FILES if os.path.lexists(path / name)]
        if existing and not _is_ours(path / "bench.json"):
            raise UsageError(
                f"{path}: holds {', '.join(existing)}, but no bench.json that siamese bench wrote; choose another "
                "folder"
            )

        def write(contents: Mapping[str, bytes]) -> None:
            for name in FILES:
                write_atomically(path / name, partial(_put, contents[name]))

        yield write


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _is_ours(file: Path) -> bool:
    """Whether it is a regular file that begins as `tables.bench_json` begins."""
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        return f'"format": {json.dumps(FORMAT)}'.encode() in opened.read(_START_BYTES)
