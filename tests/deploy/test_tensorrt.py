from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from siamese_deploy.gpu import GpuIdentity, gpu_identity, tensorrt_version
from siamese_deploy.tensorrt import HEAD_BATCH, EngineKey, engine_key, tensorrt_environment, tensorrt_options


def key_of(graph: str, precision: str, batch: tuple[int, int, int]) -> EngineKey:
    return EngineKey("0123456789abcdef" * 4, graph, "gpu", "driver", "10.14.1", "1.32.0", precision, batch)


def test_options_of_a_backbone(tmp_path: Path) -> None:
    key = key_of("backbone", "fp32", (1, 8, 32))
    assert tensorrt_options(key, tmp_path, {"images": ("N", 224, 320, 3)}) == {
        "trt_profile_min_shapes": "images:1x224x320x3",
        "trt_profile_opt_shapes": "images:8x224x320x3",
        "trt_profile_max_shapes": "images:32x224x320x3",
        "trt_fp16_enable": "False",
        "trt_layer_norm_fp32_fallback": "False",
        "trt_int8_enable": "False",
        "trt_builder_optimization_level": "3",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(tmp_path),
        "trt_engine_cache_prefix": "backbone-0123456789abcdef",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(tmp_path),
    }


def test_options_of_a_head_name_both_inputs(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int | str, ...]] = {"left": ("P", 1000), "right": ("Q", 1000)}
    options = tensorrt_options(key_of("head", "fp16", HEAD_BATCH), tmp_path, shapes)
    assert [options[f"trt_profile_{end}_shapes"] for end in ("min", "opt", "max")] == [
        "left:1x1000,right:1x1000",
        "left:1024x1000,right:1024x1000",
        "left:8192x1000,right:8192x1000",
    ]
    assert options["trt_engine_cache_prefix"] == "head-0123456789abcdef"


@pytest.mark.parametrize(
    ("graph", "precision", "half", "eight_bits"),
    [
        ("backbone", "fp32", "False", "False"),
        ("backbone", "fp16", "True", "False"),
        ("backbone", "int8-tensorrt", "False", "True"),
        ("backbone", "int8-cpu", "False", "False"),
        ("head", "fp16", "False", "False"),  # the head is float32 in every bundle
        ("head", "int8-tensorrt", "False", "False"),
    ],
)
def test_precision_flags(graph: str, precision: str, half: str, eight_bits: str) -> None:
    options = tensorrt_options(key_of(graph, precision, (1, 1, 1)), None, {"images": ("N", 2)})
    flags = ("trt_fp16_enable", "trt_layer_norm_fp32_fallback", "trt_int8_enable")
    assert tuple(options[flag] for flag in flags) == (half, half, eight_bits)


def test_without_a_folder_nothing_is_kept() -> None:
    options = tensorrt_options(key_of("backbone", "fp32", (1, 1, 1)), None, {"images": ("N", 2)})
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "False"
    assert not [name for name in options if name.endswith(("_path", "_prefix"))]


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = tensorrt_options(key_of("backbone", "fp32", (1, 1, 1)), Path("engines"), {"images": ("N", 2)})
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path / "engines")


def test_environment_variables_that_change_defaults_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorrt_environment() == []
    monkeypatch.setenv("ORT_TENSORRT_INT8_ENABLE", "1")
    monkeypatch.setenv("ORT_TENSORRT_CACHE_PATH", "engines")
    monkeypatch.setenv("ORT_OTHER", "1")
    assert tensorrt_environment() == ["ORT_TENSORRT_CACHE_PATH", "ORT_TENSORRT_INT8_ENABLE"]


class FakeLibraries:
    """Stands for NVIDIA's libraries: the few functions that are called, by name, or none of them."""

    def __init__(self, **functions: Any) -> None:
        self.functions = functions

    def __call__(self, path: str) -> Any:
        if not self.functions:
            raise OSError(f"{path}: cannot open shared object file")
        return type("Library", (), {name: staticmethod(f) for name, f in self.functions.items()})


def fill(number: int) -> Any:
    def function(reference: Any, *_: object) -> int:
        reference._obj.value = number
        return 0

    return function


def spell(text: bytes) -> Any:
    def function(buffer: Any, *_: object) -> int:
        buffer.value = text
        return 0

    return function


ATTRIBUTES = {75: 8, 76: 7, 16: 16}
WORKING: dict[str, Any] = {
    "cuInit": lambda flags: 0,
    "cuDeviceGet": fill(0),
    "cuDeviceGetName": spell(b"Orin"),
    "cuDriverGetVersion": fill(12060),
    "cuDeviceGetAttribute": lambda reference, number, device: fill(ATTRIBUTES[number])(reference),
    "nvmlInit_v2": lambda: 0,
    "nvmlShutdown": lambda: 0,
    "nvmlSystemGetDriverVersion": spell(b"540.4.0"),
    "getInferLibVersion": lambda: 101401,
}


def with_libraries(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setattr("siamese_deploy.gpu.ctypes.CDLL", FakeLibraries(**functions))


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    with_libraries(monkeypatch, **WORKING)
    assert gpu_identity() == GpuIdentity("Orin", "8.7", 16, "540.4.0", "12.6")
    assert tensorrt_version() == "10.14.1"
    key = engine_key("head", b"graph", precision="fp32", batch=HEAD_BATCH, onnxruntime="1.23.2")
    assert key.graph_sha256 == hashlib.sha256(b"graph").hexdigest()
    assert key.gpu.startswith("Orin, 8.7, 16 SM, ")
    assert (key.driver, key.tensorrt, key.onnxruntime) == ("540.4.0, CUDA 12.6", "10.14.1", "1.23.2")


@pytest.mark.parametrize("broken", ["nvmlInit_v2", "nvmlSystemGetDriverVersion"])
def test_without_the_management_library_the_driver_is_known_by_its_cuda(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with_libraries(monkeypatch, **{**WORKING, broken: lambda *_: 1})
    assert gpu_identity() == GpuIdentity("Orin", "8.7", 16, "", "12.6")
    key = engine_key("head", b"graph", precision="fp32", batch=HEAD_BATCH, onnxruntime="1.23.2")
    assert key.driver == "unnamed, CUDA 12.6"
    with_libraries(monkeypatch, **{name: f for name, f in WORKING.items() if name != broken})
    assert gpu_identity() == GpuIdentity("Orin", "8.7", 16, "", "12.6")


@pytest.mark.parametrize("broken", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDriverGetVersion"])
def test_a_gpu_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    with_libraries(monkeypatch, **{**WORKING, broken: lambda *_: 100})
    assert gpu_identity() is None
    with_libraries(monkeypatch, **{name: f for name, f in WORKING.items() if name != broken})
    assert gpu_identity() is None


def test_without_libraries_everything_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with_libraries(monkeypatch)
    assert gpu_identity() is None
    assert tensorrt_version() == ""
    key = engine_key("backbone", b"graph", precision="fp32", batch=(1, 1, 1), onnxruntime="1.32.0")
    assert (key.gpu, key.driver, key.tensorrt) == ("", "", "")


def test_tensorrt_is_found_in_pips_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs/__init__.py").write_text("raise RuntimeError('not to be run')")
    library = tmp_path / "tensorrt_libs/libnvinfer.so.10"
    library.write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(path: str) -> Any:
        if path != str(library):
            raise OSError(path)
        return type("Library", (), {"getInferLibVersion": staticmethod(WORKING["getInferLibVersion"])})

    monkeypatch.setattr("siamese_deploy.gpu.ctypes.CDLL", load)
    assert tensorrt_version() == "10.14.1"
