"""What a TensorRT engine depends on, and the options of ONNX Runtime's TensorRT provider that build one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from siamese_deploy.gpu import gpu_identity, tensorrt_version

GRAPHS = ("backbone", "head")
HEAD_BATCH = (1, 1024, 8192)
"""Smallest, best and largest number of pairs per run of the head's engine."""
# To be counted up with every change of `tensorrt_options`: an engine depends on them too.
_OPTIONS_VERSION = 1


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on; a field that is "" is unknown, and then no engine is kept."""

    graph_sha256: str
    graph: str
    """"backbone" or "head"."""
    gpu: str
    driver: str
    tensorrt: str
    onnxruntime: str
    precision: str
    """The bundle's."""
    batch: tuple[int, int, int]
    """Smallest, best and largest first dimension."""

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            raise ValueError(f"graph: expected one of {GRAPHS}, got {self.graph!r}")
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise ValueError(f"batch: expected 1 <= smallest <= best <= largest, got {self.batch}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "batch": list(self.batch), "options_version": _OPTIONS_VERSION}

    def folder_name(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.graph}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def engine_key(
    graph: str, graph_bytes: bytes, *, precision: str, batch: tuple[int, int, int], onnxruntime: str
) -> EngineKey:
    """The key on this machine.

    Args:
        graph: "backbone" or "head".
        onnxruntime: its version.
    """
    gpu = gpu_identity()
    return EngineKey(
        graph_sha256=hashlib.sha256(graph_bytes).hexdigest(),
        graph=graph,
        # Two slices of one GPU differ in multiprocessors, and one home folder may serve machines of two kinds.
        gpu=f"{gpu.name}, {gpu.compute_capability}, {gpu.multiprocessors} SM, {platform.machine()}" if gpu else "",
        driver=f"{gpu.driver or 'unnamed'}, CUDA {gpu.cuda}" if gpu else "",
        tensorrt=tensorrt_version(),
        onnxruntime=onnxruntime,
        precision=precision,
        batch=batch,
    )


def tensorrt_options(
    key: EngineKey, folder: Path | None, input_shapes: Mapping[str, tuple[int | str, ...]]
) -> dict[str, str]:
    """Options of TensorrtExecutionProvider, as its Python binding wants them.

    Args:
        folder: `EngineFolder.path`.
        input_shapes: of every input, as ONNX Runtime gives them; a dimension that is a name gets the range of the key.
    """

    def shapes(rows: int) -> str:
        """Such as "left:1x1000,right:1x1000"."""
        dims = {name: [d if isinstance(d, int) else rows for d in shape] for name, shape in input_shapes.items()}
        return ",".join(f"{name}:{'x'.join(map(str, sizes))}" for name, sizes in dims.items())

    # The head stays float32: products of embeddings overflow half precision.
    half, eight_bits = (
        key.graph == "backbone" and key.precision == precision for precision in ("fp16", "int8-tensorrt")
    )
    options = {
        **{
            f"trt_profile_{end}_shapes": shapes(rows)
            for end, rows in zip(("min", "opt", "max"), key.batch, strict=True)
        },
        # Spelled True and False; 1 and 0 are refused.
        "trt_fp16_enable": str(half),
        "trt_layer_norm_fp32_fallback": str(half),
        "trt_int8_enable": str(eight_bits),
        "trt_builder_optimization_level": "3",
        "trt_engine_cache_enable": str(folder is not None),
        "trt_timing_cache_enable": str(folder is not None),
    }
    if folder is not None:
        options |= {
            "trt_engine_cache_path": str(folder.absolute()),
            "trt_timing_cache_path": str(folder.absolute()),
            # ONNX Runtime names engines by the tensors' names, which all bundles share, and not by the weights.
            "trt_engine_cache_prefix": f"{key.graph}-{key.graph_sha256[:16]}",
        }
    return options


def tensorrt_environment() -> list[str]:
    """Environment variables that are set and change what ONNX Runtime does where an option says nothing."""
    return sorted(name for name in os.environ if name.startswith("ORT_TENSORRT_"))
