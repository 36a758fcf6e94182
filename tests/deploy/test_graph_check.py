from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_bundle import make_bundle

from siamese_deploy import graph_check
from siamese_deploy.errors import BundleError
from siamese_deploy.graph_check import OPERATORS, check_graph
from siamese_deploy.providers import import_onnxruntime

TINY = make_bundle()
GRAPHS = (TINY.backbone, TINY.head)

EXPORTED = (
    "Add AveragePool BatchNormalization Cast Clip Concat ConstantOfShape Conv DequantizeLinear Div Einsum Equal Expand "
    "Gather GatherND Gelu Gemm HardSigmoid HardSwish LayerNormalization MatMul MaxPool Mul Not Pad QuantizeLinear "
    "ReduceL2 ReduceMean Relu Reshape ScatterND Shape Sigmoid Slice Softmax Split Squeeze Sub Tanh Transpose Unsqueeze "
    "Where"
).split()
"""In exports of one network of each family of torchvision's, in every precision."""


def tiny() -> ModelProto:
    return onnx.load_model_from_string(TINY.backbone)


def passes(graph: bytes) -> bool:
    try:
        check_graph("graph.onnx", graph)
    except BundleError as error:
        message = str(error)
        assert message.startswith("graph.onnx: ")
        assert message.isprintable()
        assert len(message) < 300
        return False
    return True


def refused(model: ModelProto | bytes, words: str) -> None:
    graph = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(BundleError, match=words) as caught:
        check_graph(Path("bundle", "backbone.onnx"), graph)
    assert str(caught.value).startswith("bundle/backbone.onnx: ")
    assert not passes(graph)


def field(number: int, value: int | bytes) -> bytes:
    """One field in protobuf's encoding."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(part | 128 for part in low[:-1]), low[-1]])


@pytest.mark.parametrize("graph", GRAPHS)
def test_it_finds_the_operators_that_onnx_finds(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(graph)
    operators = {node.op_type for node in onnx.load_model_from_string(graph).graph.node}
    monkeypatch.setattr(graph_check, "OPERATORS", operators)
    assert passes(graph)
    for operator in operators:
        monkeypatch.setattr(graph_check, "OPERATORS", operators - {operator})
        with pytest.raises(BundleError, match=f"operator '{operator}' is none of those"):
            check_graph("graph", graph)


def test_allowed_operators_compute_tensors_from_tensors_without_subgraphs_or_chance() -> None:
    assert set(EXPORTED) <= OPERATORS
    for name in OPERATORS:
        schema = onnx.defs.get_schema(name, graph_check.MAX_OPSET, "")
        assert not schema.deprecated, name
        assert schema.node_determinism != onnx.defs.OpSchema.NodeDeterminism.NonDeterministic, name
        assert not any("GRAPH" in str(attribute.type) for attribute in schema.attributes.values()), name
        for parameter in (*schema.inputs, *schema.outputs):
            numbers = {kind for kind in parameter.types if kind.startswith("tensor(")} - {"tensor(string)"}
            assert numbers, (name, parameter.name)


@pytest.mark.parametrize(
    "operator",
    "If Loop Scan SequenceMap SequenceEmpty SplitToSequence Optional StringConcat RegexFullMatch StringNormalizer "
    "RandomNormal RandomUniformLike Multinomial Bernoulli Dropout SoftmaxCrossEntropyLoss NonMaxSuppression "
    "ImageDecoder LSTM relu Relu6".split(),
)
def test_other_operators_are_refused(operator: str) -> None:
    model = tiny()
    model.graph.node[5].op_type = operator
    refused(model, f"node 5 \\(''\\): operator '{operator}' is none of those a bundle may use")


@pytest.mark.parametrize("domain", ["evil", "com.microsoft", "ai.onnx.ml", "ai.onnx.training", "com.microsoft.nchwc"])
def test_operators_of_others_are_refused_also_under_an_allowed_name(domain: str) -> None:
    model = tiny()
    node = model.graph.node[5]
    node.name, node.domain = "it", domain
    refused(model, f"node 5 \\('it'\\): operator '{domain}:Relu' is none of those")
    node.op_type = "Foo"
    refused(model, f"operator '{domain}:Foo'")
    # Imported and not used it does nothing.
    node.domain, node.op_type = "ai.onnx", "Relu"
    model.opset_import.append(helper.make_opsetid(domain, 99))
    assert passes(model.SerializeToString())


def test_what_an_error_shows_of_names_is_short_and_printable() -> None:
    model = tiny()
    model.graph.node[0].name = "a\nb\x1b[2J" + "c" * 10_000
    model.graph.node[0].op_type = "Évil\n" * 1000
    refused(model, "a.nb.x1b")
    refused(TINY.backbone.replace(b"Relu", b"Re\xff\xfe"), "operator 'Re\N{REPLACEMENT CHARACTER}{2}'")


@pytest.mark.parametrize("version", [11, 0, 99, -1, 2**63 - 1])
def test_other_ir_versions_are_refused(version: int) -> None:
    model = tiny()
    model.ir_version = version
    refused(model, f"IR version: expected 1 to 10, got {version % 2**64}; use a bundle of a matching version")


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
@pytest.mark.parametrize("version", [21, 0, -1, 2**32 + 20])
def test_other_opsets_are_refused(domain: str, version: int) -> None:
    model = tiny()
    model.opset_import.append(helper.make_opsetid(domain, version))
    refused(model, f"opset: expected 1 to 20, got {version % 2**64}")
    refused(TINY.backbone + field(8, field(2, version % 2**64)), f"opset: expected 1 to 20, got {version % 2**64}")


@pytest.mark.parametrize("missing", ["ir_version", "opset_import", "graph"])
def test_a_model_without_its_essentials_is_no_graph(missing: str) -> None:
    model = tiny()
    model.ClearField(missing)
    refused(model, "is no ONNX graph .found no (IR version|opset|graph).; copy or export the bundle again")
    refused(b"", "is no ONNX graph")
    refused(TINY.backbone + field(8, b""), "opset: expected 1 to 20, got 0")


def paths_to_tensors(message: Any, seen: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every way from a message to a tensor through the fields of onnx.proto, through no message more than twice."""
    for descriptor in message.fields:
        inner = descriptor.message_type
        if inner is None or seen.count(inner.name) == 2:
            continue
        if inner.name == "TensorProto":
            yield (descriptor.name,)
        else:
            for path in paths_to_tensors(inner, (*seen, inner.name)):
                yield (descriptor.name, *path)


def added_at(path: tuple[str, ...]) -> tuple[ModelProto, Any]:
    """The tiny backbone with one more of each message on the path, and the last of them, empty."""
    model = tiny()
    message: Any = model
    for name in path:
        inner = getattr(message, name)
        message = inner.add() if hasattr(inner, "add") else inner
        message.SetInParent()
        if hasattr(message, "op_type"):
            message.op_type = "Constant"
    return model, message


def test_data_outside_the_file_is_refused_wherever_a_tensor_can_be() -> None:
    paths = list(paths_to_tensors(ModelProto.DESCRIPTOR))
    assert len(paths) > 100
    plain = {path for path in paths if passes(added_at(path)[0].SerializeToString())}
    assert plain == {
        ("graph", "initializer"),
        ("graph", "node", "attribute", "t"),
        ("graph", "node", "attribute", "tensors"),
    }
    for path in plain:
        where = "tensor" if path[-1] == "initializer" else r"node 9 \(''\): tensor"
        model, tensor = added_at(path)
        tensor.name, tensor.data_location = "outside", TensorProto.EXTERNAL
        refused(model, f"{where} 'outside' keeps its data outside the file")
        model, tensor = added_at(path)
        tensor.name = "outside"
        tensor.external_data.add(key="location", value="/etc/passwd")
        refused(model, f"{where} 'outside' keeps its data outside the file")


def test_every_value_counts_where_protobuf_takes_the_last_or_joins_the_pieces() -> None:
    # Of 64 bits protobuf keeps 32 for such a value: this one, too, is 1, EXTERNAL.
    disguised = field(7, field(5, field(8, b"w") + field(14, 2**32 + 1)))
    assert onnx.load_model_from_string(TINY.backbone + disguised).graph.initializer[-1].data_location == 1
    refused(TINY.backbone + disguised, "tensor 'w' keeps its data outside")
    second_graph = field(7, field(1, field(4, b"Loop")))
    assert onnx.load_model_from_string(TINY.backbone + second_graph).graph.node[-1].op_type == "Loop"
    refused(TINY.backbone + second_graph, "operator 'Loop'")
    refused(second_graph + TINY.backbone, "operator 'Loop'")
    for twice in (field(4, b"Relu") + field(4, b"Loop"), field(4, b"Relu") + field(7, b"") + field(7, b"evil"), b""):
        refused(TINY.backbone + field(7, field(1, twice)), "operators and . domains in node 0")
    refused(field(1, 11) + TINY.backbone, "IR version: expected 1 to 10, got 11")
    refused(TINY.backbone + field(1, 11), "IR version: expected 1 to 10, got 11")
    for tensor in (field(14, 1) + field(14, 0), field(14, 0) + field(14, 1)):
        refused(TINY.backbone + field(7, field(5, tensor)), "keeps its data outside")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("functions", "holds functions, expected a plain graph"),
        ("training_info", "holds training_info, expected a plain graph"),
        ("graph.sparse_initializer", "holds a sparse tensor, expected dense ones"),
        ("graph.node.attribute.g", "holds a subgraph"),
        ("graph.node.attribute.graphs", "holds a subgraph"),
        ("graph.node.attribute.sparse_tensor", "holds a sparse tensor"),
        ("graph.node.attribute.sparse_tensors", "holds a sparse tensor"),
    ],
)
def test_functions_training_subgraphs_and_sparse_tensors_are_refused_even_empty(path: str, words: str) -> None:
    model, _ = added_at(tuple(path.split(".")))
    refused(model, rf"node 9 \(''\): {words}" if "node" in path else f": {words}")


def test_onnx_runtimes_other_format_is_refused_though_it_is_valid_onnx() -> None:
    ort = import_onnxruntime()
    plain, marked = (field(2, b"ab" + mark) + TINY.backbone for mark in (b"ORTX", b"ORTM"))
    assert onnx.load_model_from_string(marked).graph == onnx.load_model_from_string(plain).graph
    ort.InferenceSession(plain)
    with pytest.raises(Exception, match="ORT model verification failed"):
        ort.InferenceSession(marked)
    assert passes(plain)
    refused(marked, "ONNX Runtime's own format, expected ONNX")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"\x08" + b"\xff" * 10 + b"\x01", "a number that does not end or is too large"),
        (b"\x28" + b"\x80" * 10 + b"\x00", "a number that does not end or is too large"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "a number that does not end or is too large"),
        (b"\x08", "a number that does not end"),
        (field(7, b"\x28\x80") + field(2, b""), "a number that does not end"),
        (b"\x3b\x3c", "a field of type 3"),
        (b"\x3e", "a field of type 6"),
        (b"\x00\x00", "field number 0"),
        (b"\x02\x00", "field number 0"),
        (varint(2**32 + (7 << 3 | 2)) + b"\x00", "field number 536870919"),
        (b"\x12\x05abcd", "a field that ends outside its message"),
        (b"\x12" + varint(2**63) + b"abcd", "a field that ends outside its message"),
        (b"\x39abcdefg", "a field that ends outside its message"),
        (b"\x3dabc", "a field that ends outside its message"),
        (field(7, b"\x0a\x05ab") + b"abcdef", "a field that ends outside its message"),
        (field(7, 1), "a field of the wrong type"),
        (field(7, field(1, 1)), "a field of the wrong type"),
        (field(7, field(1, field(4, 1))), "a field of the wrong type"),
        (field(7, field(5, field(14, b"\x01"))), "a field of the wrong type"),
        (b"\x0d\x0a\x00\x00\x00", "a field of the wrong type"),
    ],
)
def test_what_is_not_protobuf_is_refused(damage: bytes, words: str) -> None:
    refused(TINY.backbone + damage, words)


def test_other_fields_are_stepped_over() -> None:
    one_float, one_double = b"\x25abcd", b"\x51abcdefgh"
    for skipped in (one_float, one_double, field(1000, 5), field(2**29 - 1, b"x")):
        assert passes(TINY.backbone + field(7, field(5, skipped)))
    assert passes(TINY.backbone + field(1, 10) + field(5, 2**64 - 1))


def test_a_thousand_graphs_within_each_other_do_not_overflow_the_stack() -> None:
    graph = b""
    for _ in range(1000):
        graph = field(1, field(4, b"Relu") + field(5, field(6, graph)))
    refused(TINY.backbone + field(7, graph), r"node 0 \(''\): holds a subgraph")


def test_a_file_of_tiny_fields_is_given_up_soon() -> None:
    started_s = time.perf_counter()
    with pytest.raises(BundleError, match="more than 1,000,000 fields"):
        check_graph("graph", TINY.backbone + b"\x10\x00" * 30_000_000)
    assert time.perf_counter() - started_s < 20


def test_weights_are_stepped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "MAX_FIELDS", 200)
    model = tiny()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2**22, np.float32), "large"))
    assert passes(model.SerializeToString())


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_truncation_is_anything_but_a_bundle_error(graph: bytes) -> None:
    passed = [end for end in range(min(len(graph), 2000)) if passes(graph[:end])]
    # Without what stands at the very end, the imported opset, nothing is complete.
    assert passed == []


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_flipped_bit_is_anything_but_a_bundle_error(graph: bytes) -> None:
    results = set()
    for where in range(min(len(graph), 500)):
        for bit in range(8):
            results.add(passes(graph[:where] + bytes([graph[where] ^ 1 << bit]) + graph[where + 1 :]))
    assert results == {True, False}


@given(st.binary())
def test_any_bytes_pass_or_are_a_bundle_error(data: bytes) -> None:
    passes(data)
    passes(TINY.head + data)
    passes(TINY.head + field(7, data))
    passes(TINY.head + field(7, field(1, field(4, b"Add") + data)))


def _encoded(fields: list[tuple[int, int | bytes]]) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


def _messages(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Any number of the numbered fields in any order: f4=strategy for number 4."""
    one = [st.tuples(st.just(int(name[1:])), values) for name, values in fields.items()]
    return st.lists(st.one_of(one), max_size=4).map(_encoded)


_text = st.sampled_from([b"", b"Relu", b"Loop", b"ai.onnx", b"evil", b"w"])
_int = st.one_of(st.integers(0, 22), st.sampled_from([2**32, 2**32 + 1, 2**63, 2**64 - 1]))
_tensor = _messages(f2=_int, f8=_text, f9=_text, f14=_int, f13=st.just(field(1, b"location")))
_attribute = _messages(f1=_text, f5=_tensor, f10=_tensor, f20=_int, f6=st.just(b""), f22=st.just(b""), f3=_int)
_node = _messages(f1=_text, f3=_text, f4=_text, f7=_text, f5=_attribute)
_graph = _messages(f1=_node, f5=_tensor, f2=_text, f15=st.just(b""))
_model = _messages(f1=_int, f2=_text, f7=_graph, f8=_messages(f1=_text, f2=_int), f25=st.just(b""))


@given(_model)
def test_nothing_passes_that_onnx_reads_as_forbidden(extra: bytes) -> None:
    graph = TINY.backbone + extra
    try:
        model = onnx.load_model_from_string(graph)
    except DecodeError:
        assert not passes(graph)
        return
    assert not (passes(graph) and forbidden(model))


def forbidden(model: ModelProto) -> bool:
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    tensors = [*model.graph.initializer]
    for attribute in attributes:
        tensors += [attribute.t, *attribute.tensors]
    own = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return (
        not 1 <= model.ir_version <= 10
        or not all(1 <= version <= 20 for version in own)
        or bool(model.functions or model.training_info or model.graph.sparse_initializer)
        or any(node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx") for node in model.graph.node)
        or any(attribute.HasField("g") or attribute.HasField("sparse_tensor") for attribute in attributes)
        or any(attribute.graphs or attribute.sparse_tensors for attribute in attributes)
        or any(tensor.data_location or tensor.external_data for tensor in tensors)
    )
