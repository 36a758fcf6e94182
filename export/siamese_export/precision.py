"""The backbone in half precision and in 8 bits.

The head stays float32 in every bundle: it is a thousandth of the work, and products of embeddings overflow half
precision. So do normalisations inside the backbone, whose sums and variances need more range than their results.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from torch.utils._python_dispatch import TorchDispatchMode

from siamese_deploy.bundle import IMAGES
from siamese_deploy.errors import EnvironmentFault, ImageError, InputDataError, ParityError
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.preprocess import Preprocess, load_image
from siamese_deploy.verifier import Images, Verifier
from siamese_train.torch_verifier import TorchVerifier

# In float32 also where the rest is float16.
_NORMALISING = ["BatchNormalization", "LayerNormalization", "Softmax", "ReduceMean", "ReduceL2"]
_CALIBRATION_BATCH = 16
_SPEED_BATCH, _SPEED_ROUNDS, _SPEED_WARM_UP = 8, 24, 3


def require_range_of_half(reference: TorchVerifier, images: Images) -> None:
    """Look at the weights and at every value that the network computes in float32 from (N, H, W, 3) uint8 pictures.

    The exported graph cannot show an overflow on the CPU, where ONNX Runtime computes float16 in float32.

    Raises:
        ParityError: a value is above half of what float16 holds; the other half is for pictures not seen here.
    """
    with _LargestValue() as largest:
        for weight in reference.model.backbone.parameters():
            largest.see(weight.detach())
        for start in range(0, len(images), _CALIBRATION_BATCH):
            reference.embed(images[start : start + _CALIBRATION_BATCH])
    limit = float(np.finfo(np.float16).max) / 2
    if not largest.value <= limit:
        raise ParityError(
            f"values of up to {largest.value:.3g} occur in the network, and fp16 holds at most {2 * limit:.0f}, half "
            "of which is kept for other pictures; no bundle was written; choose another precision"
        )


class _LargestValue(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Largest magnitude of all floating-point results of PyTorch's operators inside the block; NaN if one is NaN."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = 0.0

    def see(self, tensor: torch.Tensor) -> None:
        self.value = float(np.maximum(self.value, float(tensor.abs().max())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                self.see(tensor)
        return result


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph of `backbone_model`, which is used up, in float16 with the same inputs and outputs."""
    graph = model.graph
    # The converter takes a value for float16 where it finds its type noted, and constants stay float32 if need be.
    constants = {constant.name for constant in graph.initializer}
    noted = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(noted)
    converted = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,  # the exporter noted all types; and a graph may be too large for it
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_NORMALISING],
        node_block_list=_preprocessing(model),
    )
    _drop_round_trips(converted.graph)
    # Casts were added at the end, and ONNX wants every node after those it needs.
    sorted_model = onnx_ir.from_proto(converted)
    sorted_model.graph.sort()
    model_proto: onnx.ModelProto = onnx_ir.to_proto(sorted_model)
    return model_proto


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """Between two float32 nodes the converter casts to float16 and back."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}

    def casts_to(name: str, kind: int) -> bool:
        return name in casts and casts[name].attribute[0].i == kind

    for node in graph.node:
        for i, name in enumerate(node.input):
            if casts_to(name, onnx.TensorProto.FLOAT) and casts_to(casts[name].input[0], onnx.TensorProto.FLOAT16):
                node.input[i] = casts[casts[name].input[0]].input[0]
    kept = list(graph.node)
    outputs = {value.name for value in graph.output}
    for _ in range(2):  # the cast back first, then the one before it
        used = outputs | {name for node in kept for name in node.input}
        kept = [node for node in kept if node.op_type != "Cast" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)


def eight_bits(model: onnx.ModelProto, images: Images, *, tensorrt: bool) -> onnx.ModelProto:
    """A float32 graph of `backbone_model` with the values of its layers in 8 bits (QDQ, weights per channel).

    Args:
        images: (N, H, W, 3) uint8, to find the range of each value.
        tensorrt: symmetric ranges and no INT32 biases, as TensorRT wants; else as the CPU's 8-bit instructions do, with
            weights of 7 bits: x86 without VNNI adds two products of 8 bits in 16, which overflows silently, and the
            same bundle would answer differently there (onnxruntime.quantization.quantize_static, `reduce_range`).
    """
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if tensorrt else {}
    with tempfile.TemporaryDirectory(prefix="siamese-export-") as folder, _quiet():
        path = Path(folder, "int8.onnx")
        try:
            quantize_static(
                copy.deepcopy(model),  # what it is given it empties of its weights
                path,
                _Calibration(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8 if tensorrt else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                reduce_range=not tensorrt,
                nodes_to_exclude=_preprocessing(model),
                extra_options=options,
            )
        except (OSError, MemoryError):
            raise
        except Exception as error:  # ONNX Runtime raises its own kinds, out of memory among them
            reason = str(error).strip().partition("\n")[0][:300]
            raise EnvironmentFault(
                f"ONNX Runtime could not calibrate and quantize the network in {folder}: {reason}; free memory and disk"
            ) from error
        return onnx.load(path)


def calibration_images(
    folder: ImageFolder, preprocess: Preprocess, count: int, seed: int
) -> tuple[Images, frozenset[str]]:
    """The first `count` readable pictures in `balanced_order`.

    Returns:
        (N, H, W, 3) uint8, and the SHA-256 (hex) of each file.

    Raises:
        InputDataError: not one of the pictures can be read.
    """
    images, digests = [], set()
    for image in balanced_order(folder.labels, seed).tolist():
        path = folder.absolute_path(image)
        with suppress(ImageError):
            images.append(load_image(path, preprocess))
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        if len(images) == count:
            break
    if not images:
        raise InputDataError(f"{folder.root}: none of {len(folder)} pictures can be read", code="no-pictures")
    return np.stack(images), frozenset(digests)


def balanced_order(labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """(n_images,) indices in a random order in which the classes take turns, as long as they have pictures."""
    shuffled = np.argsort(np.random.RandomState(seed).random_sample(len(labels)), kind="stable")
    by_class = np.argsort(labels[shuffled], kind="stable")
    sorted_labels = labels[shuffled][by_class]
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    order: npt.NDArray[np.int64] = shuffled[np.argsort(turn, kind="stable")]
    return order


def speed_ratio(float32: Verifier, lowered: Verifier, images: Images) -> float:
    """Time that float32 takes to embed a batch over the time of the lower precision, run in turn; ratio of medians."""
    batch = images[:_SPEED_BATCH]
    times_s: list[list[float]] = [[], []]
    for _ in range(_SPEED_ROUNDS):
        for verifier, taken_s in zip((float32, lowered), times_s, strict=True):
            started_s = time.perf_counter()
            verifier.embed(batch)
            taken_s.append(time.perf_counter() - started_s)
    before_s, after_s = (float(np.median(taken_s[_SPEED_WARM_UP:])) for taken_s in times_s)
    return before_s / after_s


def _preprocessing(model: onnx.ModelProto) -> list[str]:
    """Names of Cast, Transpose, Mul and Add after the input, which cost nothing and would round every pixel."""
    names, value = [], IMAGES
    for operator in ("Cast", "Transpose", "Mul", "Add"):
        node = next(node for node in model.graph.node if value in node.input and node.op_type == operator)
        names.append(node.name)
        value = node.output[0]
    return names


class _Calibration(CalibrationDataReader):  # type: ignore[misc]  # untyped
    def __init__(self, images: Images) -> None:
        self._batches = iter(images[i : i + _CALIBRATION_BATCH] for i in range(0, len(images), _CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGES: batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of ONNX Runtime's tools to their users."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
