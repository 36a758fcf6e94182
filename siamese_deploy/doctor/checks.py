"""What `siamese doctor` looks at on the machine itself: Python, SQLite, Pillow, cores, memory, folders and files.

Every check yields findings and raises nothing, so that one broken part does not hide the others.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from siamese_deploy.errors import SiameseError
from siamese_deploy.private_folder import private_folder, user_cache_folder

_SAFE_WAL_FROM = "3.51.3"
_LITTLE_MEMORY_BYTES = 512 * 2**20
_FEW_FILES = 256


Level: TypeAlias = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    code: str
    """Short and stable, for programs: what was looked at, or what is wrong with it."""
    message: str
    remedy: str = ""
    value: Any = None
    """The fact behind the message as JSON, where a program may want it; its form is in docs/doctor.md."""


def version_numbers(version: str) -> tuple[int, ...]:
    """Of "2.10.0+cu130": (2, 10, 0)."""
    matched = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in matched[0].split(".")) if matched else ()


def check_python() -> Iterator[Finding]:
    libc = " ".join(platform.libc_ver()).strip()
    machine = f"{platform.system()} {platform.machine()}"
    yield Finding(
        "ok",
        "python",
        ", ".join(filter(None, (platform.python_version(), machine, libc, sys.executable))),
        value={
            "version": platform.python_version(),
            "system": platform.system(),
            "machine": platform.machine(),
            "libc": libc,
            "executable": sys.executable,
        },
    )


def check_sqlite() -> Iterator[Finding]:
    try:
        version = importlib.import_module("sqlite3").sqlite_version
    except ImportError as error:
        yield Finding(
            "problem", "no-sqlite", f"this Python has no sqlite3: {error}", "install a Python built with SQLite"
        )
        return
    safe = version_numbers(version) >= version_numbers(_SAFE_WAL_FROM)
    yield Finding("ok", "sqlite", version, value={"version": version, "wal_safe": safe})
    if not safe:
        yield Finding(
            "warning",
            "sqlite-wal-unsafe",
            f"SQLite {version} is older than {_SAFE_WAL_FROM}: in WAL mode two writers can damage a database",
            "nothing to do here, the cache uses the rollback journal; keep WAL off in your own databases",
        )


def check_pillow() -> Iterator[Finding]:
    try:
        features = importlib.import_module("PIL.features")
        codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp") if features.check(name)}
    except ImportError as error:
        yield Finding("problem", "broken-pillow", f"Pillow cannot be loaded: {error}", "run: pip install pillow")
        return
    yield Finding("ok", "pillow-codecs", ", ".join(f"{n} {v}" for n, v in codecs.items()) or "none", value=codecs)
    for name, kind in (("jpg", "JPEG"), ("webp", "WEBP")):
        if name not in codecs:
            yield Finding(
                "warning",
                f"no-{name}",
                f"this Pillow was built without {kind}: such pictures are refused",
                "run: pip install --force-reinstall --only-binary :all: pillow",
            )


def control_group_limit(name: str, root: Path = Path("/")) -> str:
    """What the innermost control group (version 2) that sets `name`, such as "memory.max", sets it to; "" for none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    top = root / "sys/fs/cgroup"
    for line in lines:
        if line.startswith("0::/"):
            group = top / line[len("0::/") :]
            for folder in (group, *group.parents):
                try:
                    text = (folder / name).read_text().strip()
                except OSError:
                    text = ""
                if text and not text.startswith("max"):
                    return text
                if folder == top:
                    break
    return ""


def check_cpu(root: Path = Path("/")) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = control_group_limit("cpu.max", root).partition(" ")
    cores = int(quota) / int(period) if quota and period else None
    limit = "" if cores is None else f", a quota of {cores:g}"
    yield Finding(
        "ok",
        "cpu",
        f"{usable} of {os.cpu_count()} cores usable{limit}",
        value={"present": os.cpu_count(), "usable": usable, "quota": cores},
    )
    if cores is not None and cores <= usable - 1:
        yield Finding(
            "warning",
            "cpu-quota",
            f"{usable} cores are visible and the container's quota is {cores:g}: threads will wait for each other",
            "give the container cores instead of a quota (--cpuset-cpus), or pass threads= to OnnxVerifier",
        )


def check_memory(root: Path = Path("/")) -> Iterator[Finding]:
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return
    kilobytes = {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total, available = (kilobytes.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = int(control_group_limit("memory.max", root) or 0) or None
    usable = min(available, limit or available)
    within = "" if limit is None else f", the container may use {limit / 2**30:.1f} GiB"
    yield Finding(
        "ok",
        "memory",
        f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available{within}",
        value={"total_bytes": total, "available_bytes": available, "limit_bytes": limit},
    )
    if usable < _LITTLE_MEMORY_BYTES:
        yield Finding(
            "warning",
            "little-memory",
            f"only {usable // 2**20} MiB can be used",
            "close other programs or raise the container's limit; take small batches",
        )


def check_cache_folder() -> Iterator[Finding]:
    folder = user_cache_folder()
    if folder is None:
        yield Finding("warning", "no-home", "this user has no home folder to cache in", "set XDG_CACHE_HOME")
        return
    value = {"folder": str(folder), "exists": folder.exists()}
    if value["exists"]:
        try:
            private_folder(folder)
        except (SiameseError, OSError) as error:
            reason, _, remedy = str(error).partition("; ")
            yield Finding("problem", "cache-not-private", reason, remedy or f"run: chmod go-w {folder}", value)
            return
    state = "private" if value["exists"] else "not there yet, made private when first needed"
    yield Finding("ok", "cache-folder", f"{folder}: {state}", value=value)


def check_open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    most = None if unlimited else soft
    yield Finding("ok", "open-files", "unlimited" if most is None else f"at most {most}", value=most)
    if not unlimited and soft < _FEW_FILES:
        yield Finding("warning", "few-open-files", f"at most {soft} files may be open", f"run: ulimit -n {hard}")


CHECKS = (check_pillow, check_sqlite, check_cpu, check_memory, check_cache_folder, check_open_files)
