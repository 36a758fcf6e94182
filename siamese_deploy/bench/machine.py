"""What the figures depend on beside the bundle: processor, clock, power mode, versions, date."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from siamese_deploy.errors import MissingExtraError
from siamese_deploy.gpu import gpu_identity
from siamese_deploy.providers import import_onnxruntime, usable_cores

SAME_MACHINE = ("cpu", "cores", "threads", "gpu")
"""Figures of two runs can be compared where these agree."""
_CLOCK = "sys/devices/system/cpu/cpu0/cpufreq"


def describe_machine(
    threads: int | None, *, with_gpu: bool, libraries: Sequence[str] = (), root: Path = Path("/")
) -> dict[str, Any]:
    """Facts by name, as in bench.json; null where the system does not say.

    Args:
        threads: as of `OnnxVerifier`.
        with_gpu: ask NVIDIA's driver, which loads its library into this process.
        libraries: installed packages whose versions matter, too.
        root: where /proc, /sys and /var are.
    """
    gpu = gpu_identity() if with_gpu else None
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(root),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "threads": threads or usable_cores(),
        "gpu": None if gpu is None else gpu.name,
        "driver": None if gpu is None else gpu.driver or None,
        "governor": _text(root / _CLOCK / "scaling_governor"),
        "clock_mhz": _mhz(root / _CLOCK / "scaling_cur_freq"),
        "clock_most_mhz": _mhz(root / _CLOCK / "scaling_max_freq"),
        "power_mode": _text(root / "var/lib/nvpmodel/status"),
        "load_1min": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": _onnxruntime_version(),
            **{name: metadata.version(name) for name in ("numpy", "pillow", "siamese-toolkit", *libraries)},
        },
    }


def _onnxruntime_version() -> str | None:
    try:
        return str(import_onnxruntime().__version__)
    except MissingExtraError:  # a checkpoint needs none, and a bundle's row says that it is missing
        return None


def _cpu_name(root: Path) -> str | None:
    """Of x86 from the kernel's list; a board with ARM cores calls itself by its model."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    if found:
        return found[1].strip()
    return _text(root / "proc/device-tree/model") or platform.processor() or None


def _mhz(file: Path) -> int | None:
    text = _text(file) or ""
    return int(text) // 1000 if text.isdecimal() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text("utf-8", "replace").strip("\0\n ") or None
    except OSError:
        return None
