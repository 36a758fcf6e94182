"""What `siamese doctor` looks at in the installed software: packages, ONNX Runtime, and NVIDIA's libraries under it.

Every check yields findings and raises nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from siamese_deploy.doctor.checks import Finding, version_numbers
from siamese_deploy.gpu import gpu_identity, tensorrt_version
from siamese_deploy.installed_libraries import Library, find_library, nvidia_libraries_needed

_REQUIRED = ("numpy", "pillow", "click", "tqdm")
_OPTIONAL = ("torch", "torchvision", "onnx", "onnxscript")
_OLDEST_ONNXRUNTIME = (1, 20)
_SAFE_FROM = {
    "pillow": ("12.3.0", "decoders that a hostile picture can exhaust or corrupt memory with"),
    "torch": ("2.10.0", "CVE-2026-24747: a hostile checkpoint corrupts memory, also with weights_only"),
    "onnx": ("1.21.0", "CVE-2026-27489, CVE-2026-34446: a hostile model reads files outside its folder"),
    "onnxruntime": (
        "1.31.0",
        "external data of a hostile model may lie outside its folder; bundles are safe, they must hold none",
    ),
}
_LIBRARIES = (
    "libcuda.so.1", "libcudart.so.12", "libcudart.so.13", "libcublas.so.12", "libcublas.so.13", "libcudnn.so.8",
    "libcudnn.so.9", "libnvinfer.so.8", "libnvinfer.so.10", "libnvinfer.so.11",
)  # fmt: skip


def check_packages() -> Iterator[Finding]:
    """Versions from the packages' metadata; nothing is imported."""
    found = {name: version for name in (*_REQUIRED, *_OPTIONAL, "siamese-toolkit") if (version := _version_of(name))}
    yield Finding("ok", "packages", ", ".join(f"{name} {found[name]}" for name in sorted(found)), value=found)
    for name in _REQUIRED:
        if name not in found:
            yield Finding("problem", "missing-package", f"{name} is not installed", f"run: pip install {name}")
    for name, version in (found | {package.name: package.version for package in onnxruntime_packages()}).items():
        known = "onnxruntime" if name.startswith("onnxruntime") else name
        if known in _SAFE_FROM and version_numbers(version) < version_numbers(_SAFE_FROM[known][0]):
            floor, danger = _SAFE_FROM[known]
            yield Finding(
                "warning",
                f"vulnerable-{known}",
                f"{name} {version} is older than {floor}: {danger}",
                f"run: pip install '{name}>={floor}'; until then open nothing of strangers with it",
            )


@dataclass(frozen=True)
class OnnxruntimePackage:
    name: str
    version: str
    folder: str
    """Where its module `onnxruntime` lies."""


def onnxruntime_packages() -> list[OnnxruntimePackage]:
    """Every installed distribution that brings the module `onnxruntime`, whatever its name."""
    found: dict[tuple[str, str], OnnxruntimePackage] = {}
    for distribution in metadata.distributions():
        modules = distribution.read_text("top_level.txt")
        if modules is None:  # not every builder writes it
            record = distribution.read_text("RECORD") or ""
            brings = re.search(r"^onnxruntime/__init__\.py,", record, re.MULTILINE) is not None
        else:
            brings = "onnxruntime" in modules.split()
        if brings:
            name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "?").lower()
            folder = os.path.realpath(str(distribution.locate_file("onnxruntime")))
            found.setdefault((name, folder), OnnxruntimePackage(name, distribution.version or "?", folder))
    return list(found.values())


def check_onnxruntime(ort: ModuleType) -> Iterator[Finding]:
    """The module that was really imported, against the packages that say they brought it."""
    packages = onnxruntime_packages()
    folder = os.path.realpath(Path(str(ort.__file__)).parent)
    providers = ort.get_available_providers()
    named = ", ".join(f"{package.name} {package.version}" for package in packages) or "no package"
    yield Finding(
        "ok",
        "onnxruntime",
        f"{ort.__version__} in {folder}, from {named}; compiled in: {', '.join(providers)}",
        value={
            "version": ort.__version__,
            "folder": folder,
            "packages": {package.name: package.version for package in packages},
            "compiled_in": providers,
        },
    )
    if version_numbers(ort.__version__) < _OLDEST_ONNXRUNTIME:
        oldest = ".".join(map(str, _OLDEST_ONNXRUNTIME))
        yield Finding(
            "problem",
            "old-onnxruntime",
            f"ONNX Runtime {ort.__version__} is older than {oldest}, the oldest that is tested",
            f"run: pip install --upgrade {packages[0].name if packages else 'onnxruntime'}",
        )
    here = [package for package in packages if package.folder == folder]
    if len(packages) < 2 and packages and ort.__version__ not in [package.version for package in here]:
        yield Finding(
            "warning",
            "other-onnxruntime",
            f"imported is ONNX Runtime {ort.__version__} in {folder}, installed by pip is {named} in "
            f"{packages[0].folder}",
            f"remove what should not be imported (sys.path begins with {sys.path[0]!r}), or run: "
            f"pip install --force-reinstall --no-deps {packages[0].name}=={packages[0].version}",
        )


def check_two_onnxruntimes() -> Iterator[Finding]:
    packages = onnxruntime_packages()
    if len(packages) < 2:
        return
    names = sorted({package.name for package in packages})
    extra = "gpu" if any("gpu" in name for name in names) else "cpu"
    listed = " and ".join(f"{package.name} {package.version}" for package in packages)
    mend = f"run: pip uninstall -y {' '.join(names)} && pip install 'siamese-toolkit[{extra}]'"
    jetson = "on a Jetson install the board's own again instead, see docs/jetson.md"
    if len({package.folder for package in packages}) < len(packages):
        yield Finding(
            "problem",
            "two-onnxruntimes",
            f"{listed} are installed on top of each other: each overwrote files of the other's module onnxruntime",
            f"{mend} ({jetson})",
        )
    else:
        yield Finding(
            "warning",
            "shadowed-onnxruntime",
            f"{listed} are in different folders; only the first on sys.path is used: {packages[0].folder}",
            f"keep the one you want, or {mend} ({jetson})",
        )


def check_gpu(compiled_in: Collection[str]) -> Iterator[Finding]:
    """The NVIDIA GPU and its driver; `compiled_in` are ONNX Runtime's own names, empty where it is not installed."""
    gpu = gpu_identity()
    if gpu is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        note = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        yield Finding("ok", "gpu", f"no NVIDIA GPU answers{note}")
        return
    yield Finding(
        "ok",
        "gpu",
        f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver or 'of unknown version'} "
        f"for CUDA up to {gpu.cuda}",
        value=asdict(gpu),
    )
    if compiled_in and "CUDAExecutionProvider" not in compiled_in:
        yield Finding(
            "warning",
            "gpu-unused",
            f"this ONNX Runtime was built without CUDA and leaves the {gpu.name} idle",
            "run: pip uninstall -y onnxruntime && pip install 'siamese-toolkit[gpu]' (on a Jetson see docs/jetson.md)",
        )


def check_nvidia_libraries(ort: ModuleType | None, wanted: Collection[str]) -> Iterator[Finding]:
    """Which CUDA, cuDNN and TensorRT are here, and what the providers of this ONNX Runtime lack.

    Args:
        wanted: short names of the providers whose missing libraries are worth a warning.
    """
    found = {name: library for name in _LIBRARIES if (library := find_library(name))}
    if tensorrt := tensorrt_version():
        found["libnvinfer.so.10"] = Library(getattr(found.get("libnvinfer.so.10"), "path", ""), tensorrt)
    listed = ", ".join(f"{name} {library.version}".strip() for name, library in found.items())
    value = {name: asdict(library) for name, library in found.items()}
    yield Finding("ok", "nvidia-libraries", listed or "none found", value=value)
    if ort is None:
        return
    for provider in ("cuda", "tensorrt"):
        capi = Path(str(ort.__file__)).parent / "capi"
        needed = nvidia_libraries_needed(capi / f"libonnxruntime_providers_{provider}.so")
        if not needed:
            continue
        if provider == "cuda" and not any(name.startswith("libcudnn") for name in needed):
            needed = (*needed, "libcudnn.so.9")  # loaded by its kernels from 1.28 on, and convolutions want it
        missing = [name for name in needed if not (name in found or find_library(name))]
        yield Finding(
            "warning" if missing and provider in wanted else "ok",
            f"{provider}-libraries",
            f"needs {', '.join(needed)}; " + (f"missing: {', '.join(missing)}" if missing else "all found"),
            _libraries_remedy(missing) if missing else "",
            {"needed": list(needed), "missing": missing},
        )
        if provider == "cuda" and provider in wanted:
            yield from _check_driver(needed)


def _check_driver(needed: Collection[str]) -> Iterator[Finding]:
    gpu = gpu_identity()
    runtime = [version_numbers(name.rpartition(".")[2]) for name in needed if name.startswith("libcudart.")]
    if gpu and runtime and version_numbers(gpu.cuda)[:1] < runtime[0]:
        yield Finding(
            "warning",
            "old-driver",
            f"driver {gpu.driver} supports CUDA up to {gpu.cuda}, ONNX Runtime needs CUDA {runtime[0][0]}",
            f"install a driver for CUDA {runtime[0][0]}, or an onnxruntime-gpu for CUDA {gpu.cuda.partition('.')[0]}",
        )


def _libraries_remedy(missing: Collection[str]) -> str:
    remedies = []
    if "libcuda.so.1" in missing:
        remedies.append("install NVIDIA's driver (in a container: start it with the NVIDIA runtime)")
    if any(name.startswith(("libnvinfer", "libnvonnxparser")) for name in missing):
        remedies.append("install the TensorRT of this major version and put its folder on LD_LIBRARY_PATH")
    if any(name.startswith("libcu") and name != "libcuda.so.1" for name in missing):
        remedies.append("run: pip install 'onnxruntime-gpu[cuda,cudnn]', or install CUDA and cuDNN of these versions")
    return "; ".join(remedies)


def _version_of(package: str) -> str:
    try:
        return metadata.version(package) or ""
    except metadata.PackageNotFoundError:
        return ""
