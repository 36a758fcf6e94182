"""Which GPU, driver and TensorRT this machine has, asked of the NVIDIA libraries themselves. Nothing here raises."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from dataclasses import dataclass
from pathlib import Path

# Of cuda.h.
_MULTIPROCESSORS, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 75, 76
_TEXT_BYTES = 256


@dataclass(frozen=True)
class GpuIdentity:
    """The GPU that CUDA numbers first (after CUDA_VISIBLE_DEVICES), which is the one the providers use."""

    name: str
    """Such as "NVIDIA H200"; a slice of a GPU has its own name."""
    compute_capability: str
    """Such as "9.0"."""
    multiprocessors: int
    driver: str
    """Version of the kernel driver such as "580.65.06"; "" where NVIDIA's management library is missing or fails."""
    cuda: str
    """Newest CUDA that the driver supports, such as "13.0"."""


def gpu_identity() -> GpuIdentity | None:
    """The first GPU; None without a driver or a GPU that answers."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, version = ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(_TEXT_BYTES)
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDeviceGetName(name, _TEXT_BYTES, device)
            or cuda.cuDriverGetVersion(ctypes.byref(version))
        )
        if failed:
            return None
        major, minor, multiprocessors = (
            _attribute(cuda, number, device) for number in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS)
        )
    except (OSError, AttributeError):  # no such library, or one without the function
        return None
    return GpuIdentity(
        name=name.value.decode("ascii", "replace"),
        compute_capability=f"{major}.{minor}",
        multiprocessors=multiprocessors,
        driver=_driver_version(),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def tensorrt_version() -> str:
    """Version of the TensorRT 10 library such as "10.14.1", from the system or pip's tensorrt_libs; "" without one."""
    for path in ("libnvinfer.so.10", *_of_pip_package("libnvinfer")):
        try:
            version = ctypes.CDLL(path).getInferLibVersion()
        except (OSError, AttributeError):
            continue
        return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    return ""


def load_tensorrt_of_pip() -> None:
    """So that ONNX Runtime's TensorRT provider finds pip's TensorRT; where there is none, nothing happens."""
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        for path in _of_pip_package(library):
            with contextlib.suppress(OSError):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _attribute(cuda: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    return value.value if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device) == 0 else 0


def _driver_version() -> str:
    try:
        management = ctypes.CDLL("libnvidia-ml.so.1")
        if management.nvmlInit_v2() != 0:
            return ""
        try:
            version = ctypes.create_string_buffer(_TEXT_BYTES)
            failed = management.nvmlSystemGetDriverVersion(version, _TEXT_BYTES)
        finally:
            management.nvmlShutdown()
    except (OSError, AttributeError):
        return ""
    return "" if failed else version.value.decode("ascii", "replace")


def _of_pip_package(library: str) -> list[str]:
    """Version 10 of a library in the package tensorrt_libs, which puts it where the loader does not look."""
    try:
        package = importlib.util.find_spec("tensorrt_libs")
    except (ImportError, ValueError):
        return []
    folders = (package.submodule_search_locations if package else None) or []
    return [str(path) for folder in folders for path in sorted(Path(folder).glob(f"{library}.so.10*"))]
