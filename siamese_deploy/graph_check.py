"""What a graph holds is looked at before ONNX Runtime gets to see it.

Hashes prove that a bundle is whole, not that it means well. A graph may name other files to be read, call operators
that load code, or loop for ever; a bundle's graphs do nothing of the kind, and one that does is refused.

Operators are compared with a list of those allowed, because no list of forbidden ones is ever complete: every version
of ONNX Runtime adds some, and so does every library that registers its own.

Only the ONNX fields that matter here are read, straight from protobuf's encoding; weights are stepped over by their
length. Where a message occurs in pieces, or a value more than once, protobuf joins the pieces and takes the last value;
here every piece and every value must be in order. As subgraphs and functions are refused, nothing recurses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TypeAlias

from siamese_deploy.errors import BundleError

MAX_IR, MAX_OPSET = 10, 20
MAX_FIELDS = 1_000_000
"""Many times what any exported network has. Without a limit, a large file of tiny fields would take half an hour."""

OPERATORS = frozenset(
    # Element by element.
    "Abs Add Ceil Clip Cos Div Erf Exp Floor Log Max Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sin Sqrt Sub Sum "
    "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor "
    "Celu Elu Gelu HardSigmoid HardSwish LeakyRelu Mish PRelu Relu Selu Sigmoid Softplus Softsign Tanh ThresholdedRelu "
    # Layers.
    "AveragePool Conv ConvTranspose Einsum Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MatMul MaxPool "
    "BatchNormalization InstanceNormalization LRN LayerNormalization LpNormalization MeanVarianceNormalization "
    "Hardmax LogSoftmax Softmax "
    # Reductions.
    "ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare TopK "
    # Shapes, types and places.
    "Cast CastLike Concat Constant ConstantOfShape DepthToSpace Expand Flatten Gather GatherElements GatherND Identity "
    "OneHot Pad Range Reshape Resize ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile "
    "Transpose Trilu Unsqueeze "
    # 8 bits.
    "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear".split()
)
"""Of ONNX itself: those that exports consist of, and others that only compute tensors from tensors, without chance."""

_OWN_DOMAINS = ("", "ai.onnx")  # two names of one
_USE_EXPORTED = "use a bundle as siamese-export writes it"
# The first bytes of ONNX Runtime's other file format can be made part of a valid ONNX file.
_ORT_FORMAT_MARK = b"ORTM"

Span: TypeAlias = "tuple[int, int]"
"""Start and end of a message, string or bytes within the file."""


class _Refused(Exception):
    """The sentence about it, without the file's name."""


def check_graph(name: str | os.PathLike[str], graph: bytes) -> None:
    """Refuse a graph that is anything but plain ONNX tensor arithmetic in one file.

    Takes a few milliseconds; that the graph is right in itself is left to ONNX Runtime.

    Args:
        name: what to call the graph in an error.
        graph: the file.

    Raises:
        BundleError: not protobuf; IR or opset unknown or newer than the oldest runtime served; functions, subgraphs,
            training, sparse tensors or data outside the file; an operator that is not in OPERATORS.
    """
    try:
        if graph[4:8] == _ORT_FORMAT_MARK:
            raise _Refused(f"is marked as ONNX Runtime's own format, expected ONNX; {_USE_EXPORTED}")
        _check_model(_Protobuf(graph))
    except _Refused as reason:
        raise BundleError(f"{name}: {reason}") from reason


class _Protobuf:
    """Reads protobuf's encoding in place, and nothing beyond the end of the message asked for."""

    def __init__(self, data: bytes) -> None:
        self.whole: Span = (0, len(data))
        self._data = data
        self._fields_left = MAX_FIELDS

    def fields(self, message: Span) -> Iterator[tuple[int, int | Span | None]]:
        """Number and value of each field: whole numbers as they are, all of a length as a Span, None for floats."""
        at, end = message
        while at < end:
            tag, at = self._varint(at, end)
            number, wire_type = tag >> 3, tag & 7
            value: int | Span | None = None
            if wire_type == 0:
                value, at = self._varint(at, end)
            elif wire_type == 2:
                size, start = self._varint(at, end)
                at = start + size
                value = (start, at)
            elif wire_type in (1, 5):
                at += 8 if wire_type == 1 else 4
            else:
                raise _damaged(f"a field of type {wire_type}")
            if at > end or number == 0 or tag >= 2**32:
                raise _damaged("a field that ends outside its message" if at > end else f"field number {number}")
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _Refused(f"has more than {MAX_FIELDS:,} fields, no network has that many; {_USE_EXPORTED}")
            yield number, value

    def text(self, value: int | Span | None) -> str:
        """At most 60 bytes of it, which is more than any name that is compared has; for the rest, to be shown."""
        start, end = _span(value)
        return self._data[start : min(end, start + 60)].decode("utf-8", errors="replace")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The whole number at `at`, and where it ends."""
        value = shift = 0
        for position in range(at, min(end, at + 10)):
            byte = self._data[position]
            value |= (byte & 127) << shift
            if byte < 128:
                if value >= 2**64:
                    break
                return value, position + 1
            shift += 7
        raise _damaged("a number that does not end or is too large")


def _span(value: int | Span | None) -> Span:
    if not isinstance(value, tuple):
        raise _damaged("a field of the wrong type")
    return value


def _number(value: int | Span | None) -> int:
    if not isinstance(value, int):
        raise _damaged("a field of the wrong type")
    return value


def _damaged(what: str) -> _Refused:
    return _Refused(f"is no ONNX graph (found {what}); copy or export the bundle again")


# The numbers below are the fields' in onnx.proto.


def _check_model(file: _Protobuf) -> None:
    ir_versions, opsets, graphs = [], [], []
    for field, value in file.fields(file.whole):
        if field == 1:
            ir_versions.append(_number(value))
        elif field == 8:
            opsets += _opsets(file, _span(value))
        elif field == 7:
            graphs.append(_span(value))
        elif field in (20, 25):
            what = "training_info" if field == 20 else "functions"
            raise _Refused(f"holds {what}, expected a plain graph; {_USE_EXPORTED}")
    _check_versions("IR version", ir_versions, MAX_IR)
    _check_versions("opset", opsets, MAX_OPSET)
    if not graphs:
        raise _damaged("no graph")
    for graph in graphs:
        _check_graph(file, graph)


def _opsets(file: _Protobuf, message: Span) -> list[int]:
    """The versions it states of ONNX's own operators; others' do not matter, as no node may use them."""
    domain, versions = "", []
    for field, value in file.fields(message):
        if field == 1:
            domain = file.text(value)
        elif field == 2:
            versions.append(_number(value))
    return (versions or [0]) if domain in _OWN_DOMAINS else []


def _check_versions(what: str, versions: list[int], most: int) -> None:
    if not versions:
        raise _damaged(f"no {what}")
    for version in versions:
        if not 1 <= version <= most:
            raise _Refused(f"{what}: expected 1 to {most}, got {version}; use a bundle of a matching version")


def _check_graph(file: _Protobuf, message: Span) -> None:
    nodes = 0
    for field, value in file.fields(message):
        if field == 1:
            _check_node(file, _span(value), nodes)
            nodes += 1
        elif field == 5:
            _check_tensor(file, _span(value), "")
        elif field == 15:
            raise _Refused(f"holds a sparse tensor, expected dense ones; {_USE_EXPORTED}")


def _check_node(file: _Protobuf, message: Span, number: int) -> None:
    name, operators, domains, attributes = "", [], [], []
    for field, value in file.fields(message):
        if field == 3:
            name = file.text(value)
        elif field == 4:
            operators.append(file.text(value))
        elif field == 5:
            attributes.append(_span(value))
        elif field == 7:
            domains.append(file.text(value))
    where = f"node {number} ({name!r})"
    if len(operators) != 1 or len(domains) > 1:
        raise _damaged(f"{len(operators)} operators and {len(domains)} domains in {where}")
    operator, domain = operators[0], domains[0] if domains else ""
    if domain not in _OWN_DOMAINS or operator not in OPERATORS:
        full = f"{domain}:{operator}" if domain else operator
        raise _Refused(f"{where}: operator {full!r} is none of those a bundle may use; {_USE_EXPORTED}")
    for attribute in attributes:
        _check_attribute(file, attribute, where)


def _check_attribute(file: _Protobuf, message: Span, where: str) -> None:
    for field, value in file.fields(message):
        if field in (5, 10):
            _check_tensor(file, _span(value), f"{where}: ")
        elif field in (6, 11, 22, 23):
            what = "subgraph" if field in (6, 11) else "sparse tensor"
            raise _Refused(f"{where}: holds a {what}, which a bundle may not; {_USE_EXPORTED}")


def _check_tensor(file: _Protobuf, message: Span, where: str) -> None:
    name, outside = "", False
    for field, value in file.fields(message):
        if field == 8:
            name = file.text(value)
        elif field == 13 or (field == 14 and _number(value) != 0):
            outside = True
    if outside:
        raise _Refused(f"{where}tensor {name!r} keeps its data outside the file; {_USE_EXPORTED}")
