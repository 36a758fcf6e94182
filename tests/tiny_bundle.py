"""A complete bundle of a few kilobytes, made without torch: real graphs for a real ONNX Runtime.

Its input is not square, so that a height taken for a width is an error and not a coincidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from siamese_deploy.bundle import Bundle, Golden, Manifest, golden_image
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.providers import open_session

SIZE_HW = (24, 32)
DIM = 16


def make_bundle(change: Callable[[onnx.ModelProto], None] | None = None) -> Bundle:
    """The bundle; `change` alters the backbone's graph after the golden check was computed from the right one."""
    backbone, head = _backbone(), _head()
    manifest = Manifest(
        backbone="tiny",
        embedding_dim=DIM,
        preprocess=Preprocess(SIZE_HW),
        precision="fp32",
        batch=(1, 4, 8),
        threshold=0.5,
        threshold_origin="test",
        golden=Golden(np.zeros(DIM, np.float32), 0.0),
        created_utc="2026-01-01T00:00:00+00:00",
        about={"note": "test"},
    )
    image = golden_image(SIZE_HW)[None]
    embedding = open_session(backbone.SerializeToString(), "backbone", "cpu").run(None, {"images": image})[0]
    pair = {"left": embedding, "right": embedding}
    score = float(open_session(head.SerializeToString(), "head", "cpu").run(None, pair)[0][0, 0])
    if change:
        change(backbone)
    return Bundle(
        replace(manifest, golden=Golden(embedding[0], score)), backbone.SerializeToString(), head.SerializeToString()
    )


def _backbone() -> onnx.ModelProto:
    random = np.random.RandomState(0)
    weights = {
        "scale": np.full((1, 3, 1, 1), 1 / 64, np.float32),
        "shift": np.full((1, 3, 1, 1), -2, np.float32),
        "kernel": random.normal(0, 0.3, (24, 3, 5, 5)).astype(np.float32),
        "weight": random.normal(0, 1, (24, DIM)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["normalised"]),
        helper.make_node("Conv", ["normalised", "kernel"], ["conv"], strides=[4, 4]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalMaxPool", ["relu"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embeddings"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *SIZE_HW, 3])
    return _model(nodes, [images], ("embeddings", ["N", DIM]), weights)


def _head() -> onnx.ModelProto:
    random = np.random.RandomState(1)
    weights = {
        "w1": random.normal(0, 0.001, (DIM, 8)).astype(np.float32),
        "w2": random.normal(0, 1, (8, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["left", "right"], ["product"]),
        helper.make_node("MatMul", ["product", "w1"], ["hidden"]),
        helper.make_node("Tanh", ["hidden"], ["tanh"]),
        helper.make_node("MatMul", ["tanh", "w2"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["scores"]),
    ]
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"P_{n}", DIM]) for n in ("left", "right")]
    return _model(nodes, sides, ("scores", ["P", 1]), weights)


def _model(nodes, inputs, output, weights) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
