"""`siamese cache`: look at, shrink or remove the embeddings kept on disk."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.run_log import warn
from siamese_deploy.errors import EnvironmentFault, one_line

if TYPE_CHECKING:
    from siamese_deploy.embedding_cache import EmbeddingCache

_UNIT = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse.", "9p", "afs", "ceph", "lustre")


def _bytes(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmgt]?i?)b?", value.lower())
    if not found or found[2] not in _UNIT:
        raise click.BadParameter(f'expected a size in bytes, or one like "500MB" or "2GiB", got {value!r}')
    return int(float(found[1]) * _UNIT[found[2]])


_cache_option = click.option(
    "--cache", "folder", type=PATH, help="Cache folder.  [default: in the user's cache folder]"
)


@click.group(no_args_is_help=False)
def main() -> None:
    """Embeddings kept on disk, so that a picture that was seen before is not embedded again."""


@main.command(cls=Command)
@_cache_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stat(folder: Path | None, as_json: bool) -> None:
    """Show where the cache is and how large."""
    import sqlite3

    from siamese_deploy.embedding_cache import DEFAULT_MAX_BYTES

    path = _path(folder)
    cache = _existing(path)
    found = cache and cache.stat()
    facts = {
        "path": str(path),
        "records": found.records if found else 0,
        "bytes": found.file_bytes if found else 0,
        "max_bytes": DEFAULT_MAX_BYTES,
        "sqlite_version": sqlite3.sqlite_version,
        "journal_mode": found.journal_mode if found else None,
        "file_system": _file_system(path.parent),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(one_line(f"path: {path}{'' if found else ' (no cache yet)'}"))
    click.echo(f"records: {facts['records']:,}")
    click.echo(f"size: {facts['bytes']:,} of at most {DEFAULT_MAX_BYTES:,} bytes")
    click.echo(f"sqlite: {sqlite3.sqlite_version}, journal mode {facts['journal_mode'] or '-'}")
    click.echo(f"file system: {facts['file_system'] or 'unknown'}")
    warn_of_network(path.parent, "name a folder on a local disk with --cache DIR")


@main.command(cls=Command)
@_cache_option
@click.option(
    "--max_size",
    "--max_bytes",
    metavar="SIZE",
    callback=_bytes,
    help='Size to keep, such as "500MB".  [default: the usual cap]',
)
def prune(folder: Path | None, max_size: int | None) -> None:
    """Drop the embeddings that were not used for longest, down to a size."""
    from siamese_deploy.embedding_cache import DEFAULT_MAX_BYTES

    path = _path(folder)
    cache = _existing(path)
    if cache is None:
        click.echo(one_line(f"no cache at {path}"))
        return
    before = cache.stat()
    dropped = cache.prune(DEFAULT_MAX_BYTES if max_size is None else max_size)
    after = cache.stat()
    click.echo(
        f"dropped {dropped:,} of {before.records:,} records: {before.file_bytes:,} -> {after.file_bytes:,} bytes"
    )


@main.command(cls=Command)
@_cache_option
def clear(folder: Path | None) -> None:
    """Remove the cache, a damaged one too; other files stay."""
    from siamese_deploy.cache_file import remove_cache_file

    path = _path(folder)
    removed = remove_cache_file(path)
    click.echo(one_line(f"no cache at {path}" if removed is None else f"removed {path} ({removed:,} bytes)"))


def _path(folder: Path | None) -> Path:
    from siamese_deploy.cache_file import FILE_NAME, default_cache_folder

    folder = folder or default_cache_folder()
    if folder is None:
        raise EnvironmentFault(
            "there is no home folder to hold a cache; name a folder with --cache DIR", code="no-home"
        )
    return Path(os.path.abspath(folder), FILE_NAME)


def _existing(path: Path) -> EmbeddingCache | None:
    """To look at a cache must not make one."""
    from siamese_deploy.embedding_cache import EmbeddingCache

    return EmbeddingCache(path.parent) if os.path.lexists(path) else None


def warn_of_network(folder: Path, remedy: str) -> None:
    kind = _file_system(folder)
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        warn("network-drive", f"{folder}: on {kind}, where locks may not work between machines; {remedy}")


def _file_system(folder: Path) -> str:
    """Type of the file system, such as "ext4"; "" where the system does not tell."""
    try:
        device = os.stat(folder).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for fields in map(str.split, mounts):
                if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                    return fields[fields.index("-") + 1]
    except OSError:
        pass
    return ""
