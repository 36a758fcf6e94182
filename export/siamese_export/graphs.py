"""SiameseNetwork -> two ONNX graphs."""

from __future__ import annotations

import warnings
from typing import Any

import onnx
import torch
from torch import nn

from siamese_deploy.bundle import EMBEDDINGS, IMAGES, LEFT, RIGHT, SCORES
from siamese_deploy.errors import IntegrityError
from siamese_train.model import InputNormalisation, SiameseNetwork

OPSET = 20  # with IR 10 the newest that the ONNX Runtime of a stock Jetson (1.20 to 1.23) loads
MAX_IR = 10
# Exporting at one picture would let the exporter take the batch for a constant.
_EXAMPLE_BATCH = 2


class _Backbone(nn.Module):
    """(N, H, W, 3) uint8 -> (N, dim) float32, pre-processing included."""

    def __init__(self, network: SiameseNetwork) -> None:
        super().__init__()
        self.normalise = InputNormalisation()
        self.backbone = network.backbone

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


def backbone_graph(network: SiameseNetwork, size_hw: tuple[int, int]) -> bytes:
    """ONNX file: images uint8 (N, H, W, 3) -> embeddings float32 (N, dim)."""
    example = torch.zeros(_EXAMPLE_BATCH, *size_hw, 3, dtype=torch.uint8)
    model = _export(_Backbone(network), (example,), [IMAGES], EMBEDDINGS)
    return _finish(model, {IMAGES: "N", EMBEDDINGS: "N"})


def head_graph(network: SiameseNetwork) -> bytes:
    """ONNX file: left, right float32 (P, dim) -> scores float32 (P, 1); either side may be (1, dim)."""
    example = torch.zeros(_EXAMPLE_BATCH, network.embedding_dim)
    model = _export(_Head(network), (example, example.clone()), [LEFT, RIGHT], SCORES)
    # The exporter gives both sides one symbolic size; two names say that one of them may be 1 and is broadcast.
    return _finish(model, {LEFT: "P_left", RIGHT: "P_right", SCORES: "P"})


def _export(module: nn.Module, example: tuple[torch.Tensor, ...], inputs: list[str], output: str) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        program = torch.onnx.export(
            module.eval().cpu(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    if program is None:
        raise IntegrityError("torch.onnx.export returned nothing")
    return program.model_proto


def _finish(model: onnx.ModelProto, batch_names: dict[str, str]) -> bytes:
    """Serialise without what differs between machines: the exporter notes stack traces with paths on every node."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = batch_names[value.name]
    del graph.value_info[:]  # only hints, and they name the exporter's own batch symbol
    graph.doc_string = ""
    annotated: list[Any] = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]
    for item in (*annotated, *model.functions):
        item.doc_string = ""
        del item.metadata_props[:]
    if model.ir_version > MAX_IR or any(entry.version > OPSET for entry in model.opset_import if entry.domain == ""):
        raise IntegrityError(
            f"the exporter wrote IR {model.ir_version}, opsets {model.opset_import}; at most 10 and 20"
        )
    onnx.checker.check_model(model, full_check=True)
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized
