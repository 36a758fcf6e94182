"""fp16 and int8: the graphs' types, the gate on accuracy, calibration, and what the command says of them."""

from __future__ import annotations

import collections
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import RunCommand, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from networks import SMALL, own_checkpoint, random_network
from onnx import TensorProto

from siamese_deploy import OnnxVerifier, read_bundle
from siamese_deploy.demo_data import draw_character, write_demo_data
from siamese_deploy.errors import AccuracyError, InputDataError, ParityError
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.metrics import OperatingPoint
from siamese_deploy.preprocess import Preprocess
from siamese_export import export as export_module
from siamese_export.accuracy import Limits, cost_of_precision, measure_accuracy
from siamese_export.cli import main as export_main
from siamese_export.graphs import backbone_model, serialized
from siamese_export.precision import (
    balanced_order,
    calibration_images,
    eight_bits,
    half_precision,
    require_range_of_half,
)
from siamese_train.checkpoint import read_checkpoint
from siamese_train.torch_verifier import TorchVerifier

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/manifest.schema.json").read_text())
FAR = 0.05
# BatchNorm and a mean over positions, in a network that exports in seconds.
WITH_NORMS = ("resnet18", 32)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """drawn/train and drawn/val: 6 classes of 6 pictures to measure on, 540 different pairs."""
    out = tmp_path_factory.mktemp("drawn") / "pictures"
    write_demo_data(out, train_classes=6, val_classes=6, drawings=6)
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pth", random_network(*WITH_NORMS), *WITH_NORMS)


@pytest.fixture(scope="module")
def models(drawn: Path) -> dict[str, onnx.ModelProto]:
    """The backbone of resnet18 in each precision below fp32."""
    model = backbone_model(random_network(*WITH_NORMS), (32, 32))
    images, _ = calibration_images(scan_image_folder(drawn / "train"), Preprocess((32, 32)), 16, 1)
    made = {
        "int8-cpu": eight_bits(model, images, tensorrt=False),
        "int8-tensorrt": eight_bits(model, images, tensorrt=True),
        "fp16": half_precision(model),
    }
    return {precision: onnx.load_from_string(serialized(model, {})) for precision, model in made.items()}


@pytest.fixture(scope="module")
def bundles(drawn: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each precision, by the real command; the limits are wide, for a random network tells little apart."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = {}
    for precision in ("fp32", "fp16", "int8-cpu", "int8-tensorrt"):
        paths[precision] = folder / precision
        options = options_for(precision, drawn)
        if precision != "fp32":
            options += ["--max_auc_drop", 0.2, "--max_tar_drop", 0.5, "--max_far_growth", 10]
        arguments = ["-c", checkpoint, "-o", paths[precision], *options]
        result = CliRunner().invoke(export_main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        (folder / f"{precision}.txt").write_text(result.output)
    return paths


def options_for(precision: str, drawn: Path) -> list[object]:
    kind, _, target = precision.partition("-")
    options: list[object] = ["--precision", kind, "--val_path", drawn / "val", "--target_far", FAR]
    return options + (["--calibration", drawn / "train", "--target", target] if target else [])


def types_of_constants(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(TensorProto.DataType.Name(item.data_type) for item in model.graph.initializer)


def test_fp16_is_typed_in_half_precision_but_for_norms_and_preprocessing(models: dict[str, onnx.ModelProto]) -> None:
    graph = onnx.shape_inference.infer_shapes(models["fp16"], strict_mode=True, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types |= {item.name: item.data_type for item in graph.initializer}
    kinds = {
        (node.op_type, TensorProto.DataType.Name(types[node.input[0]])) for node in graph.node if node.op_type != "Cast"
    }
    assert {("Conv", "FLOAT16"), ("Relu", "FLOAT16"), ("Gemm", "FLOAT16"), ("ReduceMean", "FLOAT")} <= kinds
    assert ("Conv", "FLOAT") not in kinds
    assert [node.op_type for node in graph.node[:5]] == ["Cast", "Transpose", "Mul", "Add", "Cast"]
    assert (types["images"], types["embeddings"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    # No value is rounded to half precision on the way between two float32 nodes.
    makers = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT and node.input[0] in makers:
            assert makers[node.input[0]].op_type != "Cast"


@pytest.mark.slow
def test_norms_of_a_transformer_stay_float32_and_the_cpu_opens_it() -> None:
    """Without shapes noted in the graph, ONNX Runtime 1.23 to 1.32 crash on this one in half precision."""
    network = random_network("vit_b_32", 224)
    model = half_precision(backbone_model(network, (224, 224)))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    norms = [node for node in model.graph.node if node.op_type in ("LayerNormalization", "Softmax")]
    assert len(norms) == 25 + 12
    assert {types[node.input[0]] for node in norms} == {TensorProto.FLOAT}
    onnxruntime.InferenceSession(serialized(model, {}), providers=["CPUExecutionProvider"])


def test_int8_for_the_cpu_is_u8s8_per_channel(models: dict[str, onnx.ModelProto]) -> None:
    graph = models["int8-cpu"].graph
    constants = {item.name: item for item in graph.initializer}
    zero_points = {
        constants[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"
    }  # of activations: weights are stored quantized
    assert zero_points == {TensorProto.UINT8}
    weights = [item for item in constants.values() if item.data_type == TensorProto.INT8 and len(item.dims) == 4]
    assert len(weights) == 20
    for weight in weights:  # two products of 255 and 64 still fit 16 bits, where x86 without VNNI adds them
        assert np.abs(onnx.numpy_helper.to_array(weight).astype(int)).max() <= 64
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in {weight.name for weight in weights}:
            assert list(constants[node.input[1]].dims) == [constants[node.input[0]].dims[0]]
    value, operators = "images", []
    while len(operators) < 5:  # what the pixels go through
        node = next(node for node in graph.node if value in node.input)
        operators.append(node.op_type)
        value = node.output[0]
    assert operators == ["Cast", "Transpose", "Mul", "Add", "QuantizeLinear"]


def test_int8_for_tensorrt_is_symmetric_and_has_no_int32_biases(models: dict[str, onnx.ModelProto]) -> None:
    model = models["int8-tensorrt"]
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(linear) > 40
    for node in linear:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()
    assert "INT32" not in types_of_constants(model)
    assert types_of_constants(models["int8-cpu"])["INT32"]


@pytest.mark.slow
def test_the_head_is_float32_and_the_same_network_in_every_precision(bundles: dict[str, Path]) -> None:
    left, right = np.random.RandomState(1).normal(size=(2, 9, 1000)).astype(np.float32)
    scores = [OnnxVerifier(path, provider="cpu").score(left, right) for path in bundles.values()]
    assert all(np.array_equal(scores[0], others) for others in scores)
    assert len({read_bundle(path).digest for path in bundles.values()}) == 4
    assert len({read_bundle(path).manifest.about["model_id"] for path in bundles.values()}) == 4


@pytest.mark.slow
def test_manifests_say_what_the_precision_cost(bundles: dict[str, Path], drawn: Path) -> None:
    for precision, path in bundles.items():
        manifest = json.loads((path / "manifest.json").read_text())
        jsonschema.validate(manifest, SCHEMA)
        assert manifest["precision"] == precision
        assert manifest["threshold"]["origin"].startswith("false accept rate at most 0.05 on 630 pairs of val")
        about = manifest["about"]
        assert ("cost_of_precision" in about) == (precision != "fp32")
        assert ("calibration" in about) == precision.startswith("int8")
        assert ("speed_over_fp32" in about) == (precision == "int8-cpu")
        printed = (path.parent / f"{precision}.txt").read_text()
        assert ("false accepts at fp32's 0.05" in printed) == (precision != "fp32")
        assert ("speed of the backbone on this CPU" in printed) == (precision == "int8-cpu")
    about = read_bundle(bundles["int8-cpu"]).manifest.about
    assert about["calibration"]["pictures"] == 36
    float32 = read_bundle(bundles["fp32"]).manifest.about["accuracy"]
    assert abs(about["cost_of_precision"]["float32"]["roc_auc"] - float32["roc_auc"]) < 1e-3
    measured = about["cost_of_precision"]["measured"]
    assert measured["auc_drop"] == about["cost_of_precision"]["float32"]["roc_auc"] - about["accuracy"]["roc_auc"]
    note = OnnxVerifier(bundles["int8-tensorrt"], provider="cpu").provider_note
    assert note.startswith("this bundle's 8 bits are for TensorRT")
    assert OnnxVerifier(bundles["int8-cpu"], provider="cpu").provider_note == ""


@pytest.mark.slow
def test_a_slow_int8_recommends_fp32(
    run: RunCommand, drawn: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "speed_ratio", lambda *_: 0.44)  # a machine's speed is no matter for a test
    options = [*options_for("int8-cpu", drawn), "--max_auc_drop", 1, "--max_tar_drop", 1, "--max_far_growth", 99]
    result = run(export_main, "-c", checkpoint, "-o", tmp_path / "bundle", *options)
    assert result.exit_code == 0, result.output
    assert "speed of the backbone on this CPU: 0.44 times fp32's\nrecommended: --precision fp32" in result.stdout


@pytest.mark.slow
def test_a_precision_that_costs_too_much_is_refused_with_the_figures(
    run: RunCommand, drawn: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    careful = export_module.eight_bits

    def careless(model: onnx.ModelProto, *arguments: Any, **options: Any) -> onnx.ModelProto:
        return careful(shrink_last_layer(model), *arguments, **options)

    monkeypatch.setattr(export_module, "eight_bits", careless)
    result = run(export_main, "-c", checkpoint, "-o", tmp_path / "bundle", *options_for("int8-cpu", drawn))
    assert result.exit_code == 11, result.output
    assert "false accepts at fp32's 0.05" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "int8-cpu costs too much on 630 pairs of val: " in last
    assert "(at most 1.25)" in last
    assert os.listdir(tmp_path) == []

    half = export_module.half_precision
    monkeypatch.setattr(export_module, "half_precision", lambda model: half(shrink_last_layer(model)))
    result = run(export_main, "-c", checkpoint, "-o", tmp_path / "bundle", *options_for("fp16", drawn))
    assert result.exit_code == 4, result.output
    assert "the exported fp16 graphs do not answer like the network" in result.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def shrink_last_layer(model: onnx.ModelProto) -> onnx.ModelProto:
    name = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm").input[1]
    weight = next(item for item in model.graph.initializer if item.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(0.7), name))
    return model


def test_each_limit_closes_the_gate(drawn: Path, checkpoint: Path) -> None:
    reference = TorchVerifier.from_checkpoint(read_checkpoint(checkpoint), torch.device("cpu"))
    whole = measure_accuracy(reference, scan_image_folder(drawn / "val"), FAR)
    point = whole.operating_point
    assert point
    equal = cost_of_precision("fp16", whole, whole, Limits(0, 0, 1))
    assert (equal.auc_drop, equal.tar_drop, equal.far_growth) == (0, 0, 1)
    equal.require()
    scores, is_same = whole.evaluation.scores.copy(), whole.evaluation.pairs.is_same
    lowest_false_accept = np.flatnonzero(~is_same & (scores < point.threshold))[:7]
    scores[lowest_false_accept] = 1
    grown = replace(whole, evaluation=replace(whole.evaluation, scores=scores))
    accepted = round(point.far * 540)
    assert cost_of_precision("fp16", whole, grown, Limits()).far_growth == pytest.approx((accepted + 7) / accepted)
    for worse, words in (
        (replace(whole, roc_auc=whole.roc_auc - 0.003), "ROC AUC falls by 0.003"),
        (
            replace(whole, operating_point=OperatingPoint(0.5, FAR, point.tar - 0.02)),
            "accept rate at 0.05 falls by 0.02",
        ),
        (grown, "false accepts at the fp32 threshold grow by a factor of"),
        (replace(whole, roc_auc=float("nan")), "ROC AUC falls by nan"),
    ):
        with pytest.raises(AccuracyError, match=words):
            cost_of_precision("fp16", whole, worse, Limits()).require()
    with pytest.raises(InputDataError, match="too few pairs"):
        cost_of_precision("fp16", whole, replace(whole, operating_point=None), Limits())


@pytest.mark.slow
def test_values_too_large_for_half_precision_are_an_error(drawn: Path, tmp_path: Path, run: RunCommand) -> None:
    network = random_network(*SMALL)
    with torch.no_grad():
        network.backbone.features[0].weight.mul_(1e5)
    path = own_checkpoint(tmp_path / "best.pth", network, *SMALL)
    result = run(export_main, "-c", path, "-o", tmp_path / "bundle", *options_for("fp16", drawn))
    assert result.exit_code == ParityError.exit_code, result.output
    assert "occur in the network, and fp16 holds at most 65504" in result.stderr
    assert os.listdir(tmp_path) == ["best.pth"]


def test_an_overflow_inside_is_found_although_the_cpu_hides_it() -> None:
    """On the CPU ONNX Runtime computes float16 in float32, and what is large inside comes out small."""
    network = random_network(*SMALL)
    reference = TorchVerifier(network, Preprocess((64, 64)), torch.device("cpu"))
    images = np.stack([np.asarray(draw_character(k, k).resize((64, 64))) for k in range(4)])
    require_range_of_half(reference, images)
    first, after = network.backbone.features[0], network.backbone.features[3]
    with torch.no_grad():
        first.weight.mul_(1e5)
        first.bias.mul_(1e5)
        after.squeeze.weight.mul_(1e-5)
    with pytest.raises(ParityError, match="fp16 holds at most 65504"):
        require_range_of_half(reference, images)
    embedding = reference.embed(images)
    assert np.abs(embedding).max() < 1000
    with torch.no_grad():
        first.weight.mul_(1e-5)
        first.bias.mul_(1e-5)
        after.squeeze.weight[0, 0] = float("nan")
    with pytest.raises(ParityError, match="values of up to nan"):
        require_range_of_half(reference, images)
    # A weight that multiplies nothing but zeros is too large all the same.
    with torch.no_grad():
        first.weight[0], first.bias[0] = 0, -1
        after.squeeze.weight[:, 0] = 1e5
    with pytest.raises(ParityError, match=r"values of up to 1e\+05"):
        require_range_of_half(reference, images)


def test_options_that_do_not_go_together(run: RunCommand, drawn: Path, checkpoint: Path, tmp_path: Path) -> None:
    base = ("-c", checkpoint, "-o", tmp_path / "bundle")
    val = ("--val_path", drawn / "val")
    for options, words in (
        (("--precision", "fp16"), "expected --val_path"),
        (("--precision", "int8", *val), "--calibration FOLDER"),
        (("--calibration", drawn, *val), "--calibration has an effect with --precision int8 only"),
        (("--precision", "fp16", "--target", "cpu", *val), "--target has an effect with --precision int8 only"),
        (("--max_auc_drop", 0.1, *val), "--max_auc_drop has an effect with --precision fp16 and int8 only"),
        (("--precision", "fp16", "--seed", 0, *val), "--seed has an effect with --precision int8 only"),
        (
            ("--precision", "fp16", "--max_far_growth", "inf", *val),
            "--max_far_growth: expected a finite number, got inf",
        ),
        (("--target_far", 1e-320, *val), "--target_far: expected a rate between 1e-09 and 1"),
        (
            ("--bundle", tmp_path, "--triton", drawn.parent / "t"),
            "--checkpoint has no effect together with --bundle and",
        ),
        (("--show", tmp_path), "--checkpoint has no effect together with --show"),
        (("--triton", tmp_path / "bundle/t"), "parent folder does not exist"),
        (("--triton", tmp_path / "bundle"), "is inside the bundle"),
    ):
        assert_refused(run(export_main, *base, *options), 2, words)
    assert_refused(run(export_main, "--bundle", tmp_path), 2, "--bundle BUNDLE goes with --triton FOLDER or --sign KEY")
    result = run(export_main, *base, "--precision", "fp16", *val)
    assert_refused(result, 3, "a false accept rate of 0.001 needs 10,000 pairs of different classes, got 540")
    (tmp_path / "empty").mkdir()
    for folder, words in (("absent", "no such folder"), ("empty", "no ")):
        result = run(
            export_main, *base, "--precision", "int8", *val, "--target_far", FAR, "--calibration", tmp_path / folder
        )
        assert_refused(result, 3, words)


@pytest.mark.slow
def test_calibrating_on_the_pictures_measured_on_is_noticed_by_content(
    run: RunCommand, drawn: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn / "train", tmp_path / "mixed")
    for number, file in enumerate(sorted((drawn / "val").rglob("*.png"))[:5]):
        shutil.copy(file, sorted((tmp_path / "mixed").iterdir())[0] / f"other_name_{number}.png")
    wide = ("--max_auc_drop", 1, "--max_tar_drop", 1, "--max_far_growth", 99, "--calibration", tmp_path / "mixed")
    options = ["-c", checkpoint, "-o", tmp_path / "bundle", "--val_path", drawn / "val", "--target_far", FAR]
    result = run(export_main, *options, "--precision", "int8", *wide)
    assert result.exit_code == 0, result.output
    assert "gives 41 of 256 pictures to calibrate on" in result.stderr
    assert "warning: 5 files of" in result.stderr
    assert "among those calibrated on" in result.stderr


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), count=st.integers(1, 60), seed=st.integers(0, 2**32 - 1)
)
def test_calibration_is_balanced_over_classes(sizes: list[int], count: int, seed: int) -> None:
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = balanced_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert np.array_equal(order, balanced_order(labels, seed))
    taken = np.bincount(labels[order[:count]], minlength=len(sizes))
    # A class gives less than another one only if it has no more.
    assert all(n == size or n >= taken.max() - 1 for n, size in zip(taken.tolist(), sizes, strict=True))


def test_calibration_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(5), 20)
    assert len({tuple(balanced_order(labels, seed)[:10].tolist()) for seed in range(4)}) == 4


def test_unreadable_calibration_pictures_are_passed_over(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "train", tmp_path / "train")
    files = sorted((tmp_path / "train").rglob("*.png"))
    for file in files[:30]:
        file.write_text("no picture")
    images, digests = calibration_images(scan_image_folder(tmp_path / "train"), Preprocess((8, 8)), 256, 1)
    assert len(images) == len(digests) == 6
    for file in files:
        file.write_text("no picture")
    with pytest.raises(InputDataError, match="none of 36 pictures can be read"):
        calibration_images(scan_image_folder(tmp_path / "train"), Preprocess((8, 8)), 256, 1)
