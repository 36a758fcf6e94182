"""Bundle -> model repository of a Triton Inference Server: the two graphs, and a pair model that calls them.

Settings are explained in the files themselves and in docs/triton.md. All values put into them are numbers, names of
this program and hexadecimal digests, so nothing needs escaping.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from siamese_deploy.bundle import EMBEDDINGS, IMAGES, LEFT, RIGHT, SCORES, Bundle
from siamese_deploy.durable_files import folder_published_as

PAIR_MODEL, BACKBONE_MODEL, HEAD_MODEL = "siamese", "siamese_backbone", "siamese_head"
ENGINE_CACHE = "/var/cache/siamese"
"""Folder on the server that must exist and be writable where TensorRT is used."""
HEAD_LARGEST_BATCH = 8192
"""Pairs of embeddings: one call compares a picture with a gallery of thousands."""
# By the bundle's precision. TensorRT 10 has to be told of 16 and 8 bits; 11 goes by the graph alone. "int8-cpu" has
# ranges that TensorRT does not take.
_TENSORRT_PRECISION = {"fp32": "FP32", "fp16": "FP16", "int8-tensorrt": "INT8", "int8-cpu": None}

_BACKBONE = Template("""\
name: "$model"
backend: "onnxruntime"
max_batch_size: $largest
input [ { name: "$images" data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] } ]
output [ { name: "$embeddings" data_type: TYPE_FP32 dims: [ $dim ] } ]
# Requests that queue while others run go together, up to the largest batch; none is held back for company.
dynamic_batching { }
$device
# Ready means: engine built, memory taken. Smallest, best and largest batch.
$warmups
""")

_CPU = """\
# 8 bits as the CPU's instructions want them: on a GPU this file would be slow.
instance_group [ { kind: KIND_CPU } ]"""

_TENSORRT = Template("""\
# On a GPU; a server without one runs the same file on the CPU.
optimization { execution_accelerators { gpu_execution_accelerator [ {
  name: "tensorrt"
  # What is in float32 runs as TF32 unless the server is started with NVIDIA_TF32_OVERRIDE=0.
  parameters { key: "precision_mode" value: "$precision" }
  # One engine for all batch sizes: a size outside would build another one, for minutes.
  parameters { key: "trt_profile_min_shapes" value: "$images:${least}x$shape" }
  parameters { key: "trt_profile_opt_shapes" value: "$images:${best}x$shape" }
  parameters { key: "trt_profile_max_shapes" value: "$images:${largest}x$shape" }
  # ONNX Runtime does not see from an engine which weights are in it: the bundle's digest tells them apart.
  parameters { key: "trt_engine_cache_enable" value: "1" }
  parameters { key: "trt_engine_cache_path" value: "$cache/$digest" }
  parameters { key: "trt_engine_cache_prefix" value: "$digest" }
  # Times of kernels hold for every model, so a retrained one is built sooner.
  parameters { key: "trt_timing_cache_enable" value: "1" }
  parameters { key: "trt_timing_cache_path" value: "$cache" }
} ] } }""")

_HEAD = Template("""\
name: "$model"
backend: "onnxruntime"
max_batch_size: $largest
input [
  { name: "$left" data_type: TYPE_FP32 dims: [ $dim ] },
  { name: "$right" data_type: TYPE_FP32 dims: [ $dim ] }
]
output [ { name: "$scores" data_type: TYPE_FP32 dims: [ 1 ] } ]
dynamic_batching { }
model_warmup [ {
  name: "1"
  batch_size: 1
  inputs { key: "$left" value { data_type: TYPE_FP32 dims: [ $dim ] zero_data: true } }
  inputs { key: "$right" value { data_type: TYPE_FP32 dims: [ $dim ] zero_data: true } }
} ]
""")

_PAIR = Template("""\
name: "$model"
backend: "python"
max_batch_size: $largest
input [
  { name: "left" data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] },
  { name: "right" data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] }
]
output [
  { name: "scores" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "is_same" data_type: TYPE_BOOL dims: [ 1 ] }
]
# Two processes: one lays its pictures together while the other waits for the backbone.
instance_group [ { kind: KIND_CPU count: 2 } ]
dynamic_batching { }
parameters { key: "threshold" value { string_value: "$threshold" } }
parameters { key: "largest_batch" value { string_value: "$largest" } }
parameters { key: "bundle_digest" value { string_value: "$digest" } }
# No warm-up: a server that is starting refuses calls from one model to another. Both that are called are warm.
""")

_WARMUP = Template("""\
model_warmup [ {
  name: "$batch"
  batch_size: $batch
  inputs { key: "$images" value { data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] zero_data: true } }
} ]""")


def write_repository(bundle: Bundle, target: Path) -> None:
    """Publish the model repository as the new folder `target`, complete or not at all.

    Raises:
        UsageError: `target` exists, or its parent folder does not.
    """
    script = files("siamese_export").joinpath("triton_pair_model.py").read_bytes()
    with folder_published_as(target) as repository:
        _write_model(repository / BACKBONE_MODEL, _backbone_config(bundle), "model.onnx", bundle.backbone)
        _write_model(repository / HEAD_MODEL, _head_config(bundle), "model.onnx", bundle.head)
        _write_model(repository / PAIR_MODEL, _pair_config(bundle), "model.py", script)


def _write_model(folder: Path, config: str, name: str, model: bytes) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (version / name).write_bytes(model)
    (folder / "config.pbtxt").write_text(config, encoding="ascii")


def _backbone_config(bundle: Bundle) -> str:
    manifest = bundle.manifest
    height, width = manifest.preprocess.size_hw
    least, best, largest = manifest.batch
    pictures = {"images": IMAGES, "height": height, "width": width}
    precision = _TENSORRT_PRECISION[manifest.precision]
    device = _CPU
    if precision:
        device = _TENSORRT.substitute(
            precision=precision,
            images=IMAGES,
            shape=f"{height}x{width}x3",
            least=least,
            best=best,
            largest=largest,
            cache=ENGINE_CACHE,
            digest=bundle.digest,
        )
    return _BACKBONE.substitute(
        pictures,
        model=BACKBONE_MODEL,
        embeddings=EMBEDDINGS,
        dim=manifest.embedding_dim,
        largest=largest,
        device=device,
        warmups="\n".join(_WARMUP.substitute(pictures, batch=batch) for batch in sorted(set(manifest.batch))),
    )


def _head_config(bundle: Bundle) -> str:
    return _HEAD.substitute(
        model=HEAD_MODEL,
        largest=HEAD_LARGEST_BATCH,
        left=LEFT,
        right=RIGHT,
        scores=SCORES,
        dim=bundle.manifest.embedding_dim,
    )


def _pair_config(bundle: Bundle) -> str:
    manifest = bundle.manifest
    height, width = manifest.preprocess.size_hw
    return _PAIR.substitute(
        model=PAIR_MODEL,
        height=height,
        width=width,
        largest=manifest.batch[2],
        threshold=repr(manifest.threshold),
        digest=bundle.digest,
    )
