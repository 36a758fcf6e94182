"""The folder an evaluation writes into: its own earlier files are replaced, and nothing else is ever touched."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from siamese_deploy.durable_files import fsync_path, locked_folder, write_atomically
from siamese_deploy.errors import UsageError
from siamese_deploy.interrupts import interrupts_held

RECORD = ".siamese-evaluation"
"""Names of the files an evaluation wrote, one a line."""
_STAGING = ".siamese-staging-"
_OWN_NAME = re.compile(r"\d+\.png|(pairs|skipped|skipped_pairs|flips)\.csv|(metrics|comparison)\.json|report\.html")


def refuse_inside(out_path: Path, pictures: Path) -> None:
    """Results among the pictures would be taken for pictures the next time.

    Raises:
        UsageError: `out_path` is the folder `pictures` or lies in it.
    """
    if out_path.resolve().is_relative_to(pictures.resolve()):
        raise UsageError(f"{out_path}: lies in the picture folder {pictures}; choose an output folder outside of it")


@contextmanager
def result_folder(out_path: Path) -> Iterator[Path]:
    """A staging folder inside `out_path` (made if missing) whose files replace the earlier evaluation when all is well.

    On an error or interrupt within the block the earlier evaluation stays as it was. When the files are moved in,
    `metrics.json` is removed first and moved last, so a folder that has one holds the files of one evaluation.

    Raises:
        UsageError: `out_path` is a file, or holds results that no evaluation of ours recorded.
        BusyError: another evaluation writes into it.
    """
    with locked_folder(out_path):
        for stale in out_path.glob(f"{_STAGING}*"):  # left by a killed run: the lock proves that none is alive
            shutil.rmtree(stale)
        for half_written in out_path.glob(f".{RECORD}.*.tmp"):
            half_written.unlink()
        own = _recorded(out_path)
        foreign = sorted(name for name in os.listdir(out_path) if _OWN_NAME.fullmatch(name) and name not in own)
        if foreign:
            raise UsageError(
                f"{out_path}: holds {len(foreign)} files with names of results that this program did not write there "
                f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}); choose another folder",
                code="output-exists",
            )
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=out_path))
        try:
            yield staging
            with interrupts_held():
                _replace(out_path, own, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _recorded(out_path: Path) -> set[str]:
    record = out_path / RECORD
    if not record.is_file():
        return set()
    # A name that no evaluation writes is not believed, whoever put it there.
    return {name for name in record.read_text("utf-8").splitlines() if _OWN_NAME.fullmatch(name)}


def _replace(out_path: Path, own: set[str], staging: Path) -> None:
    new = sorted(os.listdir(staging), key=lambda name: (name == "metrics.json", name))
    for name in new:
        fsync_path(staging / name)
    _record(out_path, own | set(new))  # both sets, so that a crash below leaves no file without an owner
    # After a power cut, changes of names that were not synced may be found in any order.
    (out_path / "metrics.json").unlink(missing_ok=True)
    fsync_path(out_path)
    for name in own - set(new):
        (out_path / name).unlink(missing_ok=True)
    for name in new:
        if name == "metrics.json":  # the last
            fsync_path(out_path)
        os.replace(staging / name, out_path / name)
    _record(out_path, set(new))


def _record(out_path: Path, names: set[str]) -> None:
    text = "".join(f"{name}\n" for name in sorted(names))
    write_atomically(out_path / RECORD, lambda file: file.write(text.encode("ascii")))
