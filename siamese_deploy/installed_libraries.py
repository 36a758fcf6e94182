"""Shared libraries of NVIDIA: which ones a provider of ONNX Runtime needs, and which ones the loader or pip has here.

Finding a library loads it into this process, so a provider must have been tried before: afterwards it would start with
what was found here, and not with what it finds by itself.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2  # types of a program header, elf.h
_NEEDED, _STRING_TABLE = 1, 5  # tags of the dynamic section
_NVIDIA = re.compile(r"lib(cu|nv)[A-Za-z_]+\.so\.\d+")

_VERSION_FUNCTION = {
    "libcuda": "cuDriverGetVersion",
    "libcudart": "cudaRuntimeGetVersion",
    "libcudnn": "cudnnGetVersion",
    "libnvinfer": "getInferLibVersion",
}


@dataclass(frozen=True)
class Library:
    path: str
    version: str
    """Such as "13.0"; "" where the library cannot be asked."""


def nvidia_libraries_needed(path: Path) -> tuple[str, ...]:
    """Names such as "libcudart.so.13" that the loader wants for the shared library `path`.

    Empty for a file that is absent or no 64-bit little-endian ELF file (all of ONNX Runtime's Linux builds are).
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as elf:
            return tuple(name for name in _needed(elf) if _NVIDIA.fullmatch(name))
    except (OSError, ValueError, struct.error):  # absent, empty, cut off
        return ()


def find_library(soname: str) -> Library | None:
    """The library as the loader finds it, else from pip's NVIDIA packages; None where there is none that loads."""
    for name in (soname, *_of_pip_packages(soname)):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return Library(_loaded_from(soname) or name, _version(library, soname))
    return None


def _needed(elf: mmap.mmap) -> list[str]:
    if elf[:6] != b"\x7fELF\x02\x01":
        return []
    (headers_at,) = struct.unpack_from("<Q", elf, 32)
    header_bytes, headers = struct.unpack_from("<HH", elf, 54)
    loads, dynamic = [], (0, 0)
    for k in range(headers):
        kind, _, at, address, _, size = struct.unpack_from("<IIQQQQ", elf, headers_at + k * header_bytes)
        if kind == _LOAD:
            loads.append((address, at, size))
        elif kind == _DYNAMIC:
            dynamic = (at, size)
    entries = list(struct.iter_unpack("<qQ", elf[dynamic[0] : sum(dynamic)]))
    (table,) = [value for tag, value in entries if tag == _STRING_TABLE]
    (strings_at,) = [at + table - address for address, at, size in loads if address <= table < address + size]
    names = [strings_at + value for tag, value in entries if tag == _NEEDED]
    return [elf[at : elf.find(b"\0", at)].decode("ascii", "replace") for at in names]


def _of_pip_packages(soname: str) -> list[str]:
    folders = [Path(folder) for folder in sys.path if folder]
    patterns = (f"nvidia/*/lib/{soname}", f"tensorrt_libs/{soname}")
    return [str(path) for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]


def _loaded_from(soname: str) -> str:
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    paths = [line[line.index("/") :] for line in lines if "/" in line]
    return next((path for path in paths if path.rpartition("/")[2].startswith(soname)), "")


def _version(library: ctypes.CDLL, soname: str) -> str:
    kind = soname.partition(".")[0]
    try:
        if kind in ("libcuda", "libcudart"):
            number = ctypes.c_int()
            failed = getattr(library, _VERSION_FUNCTION[kind])(ctypes.byref(number))
            return "" if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"
        value = getattr(library, _VERSION_FUNCTION[kind])()
    except (KeyError, AttributeError):  # cuBLAS wants a handle; a library without the function
        return ""
    step = 10_000 if value >= 10_000 else 1000  # both changed their numbering: cuDNN 8.9.2 is 8902, 9.1.0 is 90100
    return f"{value // step}.{value % step // 100}.{value % 100}"
