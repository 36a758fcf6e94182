"""SiameseNetwork -> two ONNX graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import nn

from siamese_deploy.bundle import EMBEDDINGS, IMAGES, LEFT, RIGHT, SCORES
from siamese_deploy.errors import IntegrityError
from siamese_deploy.graph_check import MAX_OPSET, check_graph
from siamese_train.model import InputNormalisation, SiameseNetwork

# Exporting at one picture would let the exporter take the batch for a constant.
_EXAMPLE_BATCH = 2


class _Backbone(nn.Module):
    """(N, H, W, 3) uint8 -> (N, dim) float32, pre-processing included."""

    def __init__(self, normalise: InputNormalisation, backbone: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.backbone(self.normalise(images))
        return embeddings


class _Head(nn.Module):
    """(P, dim), (P, dim) float32 -> (P, 1) float32."""

    def __init__(self, network: SiameseNetwork) -> None:
        super().__init__()
        self.cls_head = network.cls_head

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.cls_head(left * right)
        return scores


def backbone_model(network: SiameseNetwork, size_hw: tuple[int, int]) -> onnx.ModelProto:
    """images uint8 (N, H, W, 3) -> embeddings float32 (N, dim), as `serialized` takes it."""
    example = torch.zeros(_EXAMPLE_BATCH, *size_hw, 3, dtype=torch.uint8)
    with _free_of_shape_arithmetic(network.backbone) as normalise:
        model = _export(_Backbone(normalise, network.backbone), (example,), [IMAGES], EMBEDDINGS)
    return _named_batch(model, {IMAGES: "N", EMBEDDINGS: "N"})


def head_model(network: SiameseNetwork) -> onnx.ModelProto:
    """left, right float32 (P, dim) -> scores float32 (P, 1), as `serialized` takes it; either side may be (1, dim)."""
    example = torch.zeros(_EXAMPLE_BATCH, network.embedding_dim)
    model = _export(_Head(network), (example, example.clone()), [LEFT, RIGHT], SCORES)
    # The exporter gives both sides one symbolic size; two names say that one of them may be 1 and is broadcast.
    return _named_batch(model, {LEFT: "P_left", RIGHT: "P_right", SCORES: "P"})


def serialized(model: onnx.ModelProto, metadata: dict[str, str]) -> bytes:
    """The ONNX file, without what differs between machines: the exporter notes stack traces with paths on every node.

    Args:
        metadata: becomes the file's only metadata.

    Raises:
        BundleError: the runtime would refuse it: too new for those we serve, or an operator it does not allow.
    """
    model = copy.deepcopy(model)
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    annotated: list[Any] = [model, graph, *graph.node, *graph.initializer, *values]
    for item in (*annotated, *model.functions):
        item.doc_string = ""
        del item.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    domains = {node.domain for node in graph.node}
    opsets = [entry for entry in model.opset_import if entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    check_graph("exported graph", data)
    return data


@contextmanager
def _free_of_shape_arithmetic(backbone: Any) -> Iterator[InputNormalisation]:
    """The backbone without what the exporter writes out with Shape, Gather and the like; and its pre-processing."""
    # Pooling a permuted tensor (ConvNeXt, Swin) is exported with its strides, unless it is laid out anew.
    pools = [module for module in backbone.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    hooks = [pool.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for pool in pools]
    hooks += [pool.register_forward_hook(_pool_by_matrices) for pool in pools]
    normalise = InputNormalisation()
    # GoogLeNet and Inception scale once more, channel by channel; that becomes part of the one scaling.
    scales_again = bool(getattr(backbone, "transform_input", False))
    if scales_again:
        shift = backbone._transform_input(torch.zeros(1, 3, 1, 1))
        scale = backbone._transform_input(torch.ones(1, 3, 1, 1)) - shift
        normalise.scale, normalise.shift = normalise.scale * scale, normalise.shift * scale + shift
        backbone.transform_input = False
    try:
        yield normalise
    finally:
        if scales_again:
            backbone.transform_input = True
        for hook in hooks:
            hook.remove()


def _pool_by_matrices(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
    """Adaptive average pooling between sizes that do not divide (VGG on small pictures), else written with indices."""
    (height, width), (new_height, new_width) = inputs[0].shape[-2:], output.shape[-2:]
    if height % new_height == 0 and width % new_width == 0:
        return None
    return _means(height, new_height) @ inputs[0] @ _means(width, new_width).T


def _means(size: int, new_size: int) -> torch.Tensor:
    """(new_size, size): row i averages the positions that torch.nn.AdaptiveAvgPool2d averages for i."""
    rows = torch.zeros(new_size, size)
    for i in range(new_size):
        start, end = i * size // new_size, -(-(i + 1) * size // new_size)
        rows[i, start:end] = 1 / (end - start)
    return rows


def _export(module: nn.Module, example: tuple[torch.Tensor, ...], inputs: list[str], output: str) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        program = torch.onnx.export(
            module.eval().cpu(),
            example,
            dynamo=True,
            opset_version=MAX_OPSET,
            input_names=inputs,
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    if program is None:
        raise IntegrityError("torch.onnx.export returned nothing")
    return program.model_proto


def _named_batch(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = names[value.name]
    return model
