"""Which ONNX Runtime execution provider, with which options. Strict: the one asked for, or an error; never silent.

ONNX Runtime itself falls back to the CPU with a warning when a GPU provider cannot start, and its list of "available"
providers is what was compiled in, not what works. So a session is opened without fallback, and what it really uses is
compared with what was asked for.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from siamese_deploy.errors import BundleError, ProviderError, UsageError, needs_extra
from siamese_deploy.gpu import load_tensorrt_of_pip

ORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CHOICES = ("auto", *ORT_NAMES)

_OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    # HEURISTIC: the default EXHAUSTIVE search runs again for each new batch size. TF32 off: scores as on the CPU.
    # The arena grows by what is asked for, not to the next power of two: two sessions share a small GPU.
    "cuda": {
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    },
    "tensorrt": {},
}
_SESSION_CONFIG = {
    # Threads that wait for the next run sleep; within a run they spin, which is what makes it quick.
    "session.force_spinning_stop": "1",
    # Bytes that could also be read as ONNX Runtime's own format, which nobody has checked, are read as ONNX.
    "session.load_model_format": "ONNX",
}
_LARGE_GRAPH_BYTES = 2**30
# In ONNX Runtime's messages: the machine has no more to give, whatever the graph.
_OUT_OF_RESOURCES = ("pthread_create failed", "bad_alloc", "bad allocation", "Failed to allocate memory")
_QUIET = threading.RLock()
_LIBRARY = {"cuda": "libonnxruntime_providers_cuda.so", "tensorrt": "libonnxruntime_providers_tensorrt.so"}


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        MissingExtraError: it is not installed.
    """
    # From 1.29 on it tells Microsoft of every session, and keeps a device id in the user's cache folder, unless this is
    # set before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with needs_extra("cpu"):
        import onnxruntime
    module: ModuleType = onnxruntime
    return module


def providers_to_try(asked: str) -> tuple[str, ...]:
    """Short names, best first. TensorRT builds engines for minutes, so "auto" leaves it to those who name it.

    Raises:
        UsageError: `asked` is none of CHOICES.
    """
    if asked not in CHOICES:
        raise UsageError(f"provider {asked!r}: expected one of {', '.join(CHOICES)}")
    return ("cuda", "cpu") if asked == "auto" else (asked,)


def require_compiled_in(provider: str) -> None:
    """Raises:
    ProviderError: the installed ONNX Runtime was built without it.
    """
    if ORT_NAMES[provider] not in import_onnxruntime().get_available_providers():
        raise ProviderError(_refusal(provider))


def open_session(
    graph: bytes,
    name: str,
    provider: str,
    threads: int | None = None,
    *,
    options: Mapping[str, str] | None = None,
    gpu_memory_bytes: int | None = None,
    profile_into: str = "",
) -> Any:
    """An onnxruntime.InferenceSession of `graph` that really runs on `provider`.

    Args:
        name: what to call the graph in an error.
        threads: CPU threads within one operator; default: the cores this process may use.
        options: more options of the provider.
        gpu_memory_bytes: most that the session's arena on the GPU may hold (CUDA's own workspaces come on top).
        profile_into: folder for `nodes_by_provider` where ONNX Runtime cannot be asked; "" for no profile.

    Raises:
        ProviderError: the provider cannot start here; the message names what is missing.
        BundleError: ONNX Runtime refuses the graph.
    """
    ort = import_onnxruntime()
    require_compiled_in(provider)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 4  # what it logs as an error it also raises, and then it is one line of ours
    # Explicit, because ONNX Runtime otherwise pins threads to cores that may be offline (Jetson power modes).
    session_options.intra_op_num_threads = threads or usable_cores()
    for key, value in _SESSION_CONFIG.items():
        session_options.add_session_config_entry(key, value)
    if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    elif profile_into:
        session_options.enable_profiling = True
        session_options.profile_file_prefix = str(Path(profile_into) / name)
    if len(graph) > _LARGE_GRAPH_BYTES:  # the arena doubles what it asks for, and keeps it
        session_options.enable_cpu_mem_arena = False
        session_options.enable_mem_pattern = False
    limit = {} if gpu_memory_bytes is None else {"gpu_mem_limit": str(gpu_memory_bytes)}
    asked: list[tuple[str, dict[str, str]]] = [(ORT_NAMES[provider], {**_OPTIONS[provider], **(options or {})})]
    if provider == "tensorrt":  # what TensorRT does not take still stays on the GPU
        asked.append((ORT_NAMES["cuda"], _OPTIONS["cuda"] | limit))
    elif provider == "cuda":
        asked[0][1].update(limit)
    _load_libraries_of_pip(ort, provider)
    with _quiet(ort):
        try:
            session = ort.InferenceSession(graph, session_options, providers=asked, enable_fallback=0)
        except Exception as error:  # ONNX Runtime raises its own kinds, RuntimeError and UnicodeDecodeError
            if provider != "cpu" and _why_unavailable(provider):
                raise ProviderError(_refusal(provider)) from error
            if any(words in str(error) for words in _OUT_OF_RESOURCES):
                raise ProviderError(
                    f"provider {provider}: ONNX Runtime {ort.__version__} cannot open {name}: {_line(error)}; free "
                    "memory, or use fewer --threads",
                    code="out-of-memory",
                ) from error
            kind = ProviderError if provider != "cpu" else BundleError
            raise kind(f"{name}: ONNX Runtime {ort.__version__} refuses it on {provider}: {_line(error)}") from error
    if session.get_providers()[0] != ORT_NAMES[provider]:
        raise ProviderError(_refusal(provider))
    return session


def _load_libraries_of_pip(ort: ModuleType, provider: str) -> None:
    """CUDA, cuDNN and TensorRT of pip lie where the loader does not look, unless they are loaded already."""
    preload_dlls = getattr(ort, "preload_dlls", None)  # from 1.21 on
    if provider != "cpu" and preload_dlls is not None:
        with _quiet(ort):
            preload_dlls()
    if provider == "tensorrt":
        load_tensorrt_of_pip()


def nodes_by_provider(session: Any) -> dict[str, int]:
    """How many nodes of the optimised graph each provider (by its short name) was given.

    Of an ONNX Runtime that cannot be asked, those that ran since the session was opened with `profile_into`; profiling
    ends here. Empty where neither is possible.
    """
    counts: collections.Counter[str] = collections.Counter()
    short = {long: name for name, long in ORT_NAMES.items()}
    if hasattr(session, "get_provider_graph_assignment_info"):
        for part in session.get_provider_graph_assignment_info():
            counts[short.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    elif session.get_session_options().enable_profiling:
        with open(session.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
        # A node that ran several times has several events.
        ran = {
            (event["name"], event["args"]["provider"])
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        }
        for _, provider in ran:
            counts[short.get(provider, provider)] += 1
    return dict(counts)


def run_session(run: Callable[..., list[Any]], output: str, inputs: dict[str, Any], provider: str) -> Any:
    """One output of a session's `run`; what fails there is the machine's fault: the graph and its inputs were checked.

    Raises:
        ProviderError: out of memory, or a build of ONNX Runtime without code for this GPU.
    """
    try:
        return run([output], inputs)[0]
    except Exception as error:
        version = import_onnxruntime().__version__
        raise ProviderError(
            f"provider {provider}: ONNX Runtime {version} failed while running: {_line(error)}; "
            "free memory, or check that this build of it supports the device",
            code="provider-failed",
        ) from error


def give_back_freed_memory() -> None:
    """To the system, where the C library is one that keeps it: after a graph is opened that is twice its weights."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def usable_cores() -> int:
    """Cores this process may run on (a container or `taskset` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refusal(provider: str) -> str:
    reason, remedy = _why_unavailable(provider) or (
        f"ONNX Runtime {import_onnxruntime().__version__} does not start it and does not say why",
        "compare its CUDA, cuDNN and TensorRT versions with the installed ones",
    )
    return f"provider {provider}: {reason}; {remedy}"


def _why_unavailable(provider: str) -> tuple[str, str] | None:
    """What keeps a GPU provider from starting, and the remedy; None where nothing is known to be missing."""
    ort = import_onnxruntime()
    if ORT_NAMES[provider] not in ort.get_available_providers():
        return (
            f"the installed ONNX Runtime {ort.__version__} has no {ORT_NAMES[provider]}",
            "run: pip uninstall onnxruntime && pip install 'siamese-toolkit[gpu]' (on a Jetson see docs/jetson.md)",
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1 is missing: no NVIDIA driver on this machine", "install the driver, or use --provider cpu"
    _load_libraries_of_pip(ort, provider)
    capi = Path(str(ort.__file__)).parent / "capi"
    try:
        ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(capi / _LIBRARY[provider]))
    except OSError as error:
        if "cannot open shared object file" in str(error) and _LIBRARY[provider] not in str(error).partition(":")[0]:
            return _line(error), f"install the CUDA, cuDNN or TensorRT that ONNX Runtime {ort.__version__} needs"
    return None


@contextlib.contextmanager
def _quiet(ort: ModuleType) -> Iterator[None]:
    """ONNX Runtime's chatter off stdout (it uses print) and off stderr (its native log); our error says it instead."""
    with _QUIET:  # stdout and the level are the process's: two threads would put back each other's
        ort.set_default_logger_severity(4)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            ort.set_default_logger_severity(2)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
