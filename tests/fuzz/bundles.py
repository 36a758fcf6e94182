"""Bundles: damaged ones, which nothing may run, and ones made by somebody who makes the hashes right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz.driver import Target
from fuzz.mutations import VALUES, flipped, mutated, mutated_json
from onnx import AttributeProto, ModelProto, TensorProto, helper
from tiny_bundle import DIM, SIZE_HW, make_bundle

import siamese_deploy.bundle
import siamese_deploy.runtime
from siamese_deploy import OnnxVerifier
from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, read_bundle
from siamese_deploy.errors import BundleError, SiameseError
from siamese_deploy.graph_check import OPERATORS

NAMES = (MANIFEST, BACKBONE, HEAD)
SCHEMA = Path(__file__).parents[2] / "docs/manifest.schema.json"
_HUGE = (-1, 0, 1, 2, 3, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
_FORBIDDEN_OPERATORS = ("Loop", "If", "Scan", "SequenceMap", "RandomNormal", "Evil", "", "StringNormalizer", "Optional")


def sealed(value: Any) -> bytes:
    """The manifest with its own hash made right, by a second implementation of what docs/bundle.md says."""
    if isinstance(value, dict):
        value = {key: content for key, content in value.items() if key != "manifest_sha256"}
        value["manifest_sha256"] = hashlib.sha256(_canonical(value)).hexdigest()
    return _canonical(value)


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")


class _Bundle(Target):
    """The tiny bundle in a folder of which each input replaces one file; an input is the file's name, NUL, content."""

    memory_mib = 1024

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bundle"
        self.bundle = make_bundle()
        self.bundle.write(self.folder)
        self.files = {name: (self.folder / name).read_bytes() for name in NAMES}
        self.manifest = json.loads(self.files[MANIFEST])
        self.sessions = 0
        really_open = siamese_deploy.runtime.open_session

        def counting(*arguments: Any, **options: Any) -> Any:
            self.sessions += 1
            return really_open(*arguments, **options)

        siamese_deploy.runtime.open_session = counting
        self.probe = np.random.RandomState(1).randint(0, 256, (2, *SIZE_HW, 3)).astype(np.uint8)

    def _outcome(self) -> str:
        """Of opening and using the bundle: an error of ours, or scores that are scores."""
        self.sessions = 0
        try:
            verifier = OnnxVerifier(self.folder, provider="cpu", threads=1)
            embeddings = verifier.embed(self.probe)
            scores = verifier.score(embeddings[:1], embeddings)
        except SiameseError as error:
            return f"{type(error).__name__}{' after opening' if self.sessions else ''}"
        assert scores.shape == (2,)
        assert ((scores >= 0) & (scores <= 1)).all()
        return "runs"


class BundleBytes(_Bundle):
    """Every bit of the manifest, one bit of every byte of the graphs, every length: refused before anything runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.order = np.random.RandomState(0).permutation(self.total(self.files))

    @staticmethod
    def total(files: dict[str, bytes]) -> int:
        return 7 * len(files[MANIFEST]) + 2 * sum(map(len, files.values()))

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        k = int(self.order[number])
        for name, data in self.files.items():
            bits = 8 if name == MANIFEST else 1
            if k < bits * len(data):
                changed = flipped(data, k if bits == 8 else 8 * k + random.randint(8))
                return name.encode() + b"\0" + changed
            k -= bits * len(data)
        for name, data in self.files.items():
            if k < len(data):
                return name.encode() + b"\0" + data[:k]
            k -= len(data)
        raise IndexError(number)

    def check(self, data: bytes) -> str:
        name, _, content = data.partition(b"\0")
        file = self.folder / name.decode()
        file.write_bytes(content)
        try:
            with_sessions = self._outcome()
        finally:
            file.write_bytes(self.files[file.name])
        assert with_sessions == BundleError.__name__, f"{file.name}: {with_sessions}"
        return with_sessions

    def sabotage(self) -> None:
        """No hash of a graph is compared."""

        class Any_(str):
            def __ne__(self, other: object) -> bool:
                return False

            __hash__ = str.__hash__

        class AnyHash(dict[str, str]):
            def get(self, *_: object) -> Any_:  # type: ignore[override]
                return Any_()

        parse = siamese_deploy.bundle._parse_manifest

        def lax(path: Path, text: bytes) -> Any:
            manifest, _, _, own = parse(path, text)
            return manifest, AnyHash(), Any_(), own

        siamese_deploy.bundle._parse_manifest = lax


class BundleGraphs(_Bundle):
    """Graphs edited in their structure, in a bundle whose hashes are right: an error of ours, or scores."""

    seconds = 5.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = {name: onnx.load_from_string(self.files[name]) for name in (BACKBONE, HEAD)}

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        name = (BACKBONE, HEAD)[number % 2]
        model = ModelProto()
        model.CopyFrom(self.models[name])
        for _ in range(random.randint(1, 4)):
            EDITS[random.randint(len(EDITS))](random, model)
        data = model.SerializeToString()
        if random.randint(4) == 0:
            data = _not_utf8(random, data) if random.randint(2) else mutated(random, data, most=2)
        return name.encode() + b"\0" + data

    def check(self, data: bytes) -> str:
        name, _, graph = data.partition(b"\0")
        graphs = {BACKBONE: self.bundle.backbone, HEAD: self.bundle.head} | {name.decode(): graph}
        bundle = replace(self.bundle, backbone=graphs[BACKBONE], head=graphs[HEAD])
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in graphs.items()}
        for name_, content in graphs.items():
            (self.folder / name_).write_bytes(content)
        (self.folder / MANIFEST).write_bytes(sealed(self.manifest | {"files": hashes, "bundle_digest": bundle.digest}))
        return self._outcome()

    def sabotage(self) -> None:
        """ONNX Runtime's own errors come through."""

        def open_session(graph: bytes, *_: object, **__: object) -> Any:
            import onnxruntime

            return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

        siamese_deploy.runtime.open_session = open_session


class Manifests(_Bundle):
    """Manifests of another content, after the schema and beside it, with their own hash made right."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.schema = json.loads(SCHEMA.read_text())

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        value = json.loads(self.files[MANIFEST])
        if random.randint(3):
            for _ in range(random.randint(1, 3)):
                _set_by_schema(random, value, self.schema, self.schema)
        else:
            value = mutated_json(random, value)
        data = sealed(value)
        if random.randint(8) == 0:
            data = mutated(random, data)
        return MANIFEST.encode() + b"\0" + data

    def check(self, data: bytes) -> str:
        (self.folder / MANIFEST).write_bytes(data.partition(b"\0")[2])
        outcome = self._outcome()
        try:
            read_bundle(self.folder)
        except SiameseError:
            return outcome
        return f"read, {outcome}"

    def sabotage(self) -> None:
        """Fields are taken for what they should be."""
        siamese_deploy.bundle._typed = lambda value, key, kind: value[key]


def _set_by_schema(random: np.random.RandomState, value: Any, schema: dict[str, Any], root: dict[str, Any]) -> None:
    """One field at a random depth gets a value at or beyond the borders that the schema draws."""
    while True:
        schema = _resolved(schema, root)
        names = sorted(schema.get("properties", {}))
        if not names or not isinstance(value, dict):
            return
        name = names[random.randint(len(names))]
        inner = _resolved(schema["properties"][name], root)
        if "properties" in inner and isinstance(value.get(name), dict) and random.randint(4):
            value, schema = value[name], inner
            continue
        candidates = [*_borders(inner), VALUES[random.randint(len(VALUES))]]
        value[name] = candidates[random.randint(len(candidates))]
        return


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def _borders(schema: dict[str, Any]) -> list[Any]:
    found: list[Any] = list(schema.get("enum", []))
    for key, step in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
        if key in schema:
            found += [schema[key], schema[key] + step, float(schema[key]), 2**63]
    if schema.get("type") == "array":
        found += [[], [1], [24, 32], [32, 24], [24, 32, 3], [24.0, 32], [True, 32], [2**31, 2**31], ["24", "32"]]
    if schema.get("type") == "string":
        found += ["", "a" * 64, "0" * 64, "A" * 64, "AAAA", "AAAA" * (DIM // 3), "====", "fp32", "\u00e9", "\ud800"]
    return found


def _not_utf8(random: np.random.RandomState, data: bytes) -> bytes:
    names = [name for name in (b"images", b"embeddings", b"left", b"scores", b"scaled", b"kernel", b"Mul", b"tiny")]
    name = names[random.randint(len(names))]
    return data.replace(name, bytes([(0xFF, 0xC0, 0x80, 0xED)[random.randint(4)]]) * len(name), random.randint(1, 3))


# One edit each; all of them draw what they need from the RandomState.


def _one_of(random: np.random.RandomState, items: Any) -> Any:
    return items[random.randint(len(items))]


def _names(model: ModelProto) -> list[str]:
    graph = model.graph
    return ["", "nothing", *(item.name for item in (*graph.input, *graph.output, *graph.initializer))] + [
        name for node in graph.node for name in node.output
    ]


def _nodes(random: np.random.RandomState, model: ModelProto) -> None:
    nodes = model.graph.node
    kind = random.randint(4)
    if not nodes or kind == 0:
        node = nodes.add()
        node.op_type = _one_of(random, sorted(OPERATORS))
        node.input.extend(_one_of(random, _names(model)) for _ in range(random.randint(5)))
        node.output.extend(_one_of(random, (*_names(model), "new")) for _ in range(random.randint(1, 3)))
    elif kind == 1:
        del nodes[random.randint(len(nodes))]
    elif kind == 2:
        nodes.add().CopyFrom(nodes[random.randint(len(nodes))])
    else:
        a, b = random.randint(len(nodes), size=2)
        kept = onnx.NodeProto()
        kept.CopyFrom(nodes[a])
        nodes[a].CopyFrom(nodes[b])
        nodes[b].CopyFrom(kept)


def _operator(random: np.random.RandomState, model: ModelProto) -> None:
    for node in model.graph.node[random.randint(len(model.graph.node) or 1) :][:1]:
        node.op_type = _one_of(random, sorted(OPERATORS) if random.randint(4) else _FORBIDDEN_OPERATORS)
        if random.randint(6) == 0:
            node.domain = _one_of(random, ("com.microsoft", "ai.onnx.ml", "ai.onnx", "evil", "com.microsoft.nchwc"))


def _wires(random: np.random.RandomState, model: ModelProto) -> None:
    for node in model.graph.node[random.randint(len(model.graph.node) or 1) :][:1]:
        names = node.input if random.randint(3) else node.output
        if names and random.randint(3):
            names[random.randint(len(names))] = _one_of(random, _names(model))
        elif names and random.randint(2):
            del names[random.randint(len(names))]
        else:
            names.append(_one_of(random, _names(model)))


def _attributes(random: np.random.RandomState, model: ModelProto) -> None:
    for node in model.graph.node[random.randint(len(model.graph.node) or 1) :][:1]:
        names = [item.name for item in node.attribute] + [
            "to", "perm", "axis", "axes", "strides", "pads", "dilations", "group", "kernel_shape", "value", "alpha",
            "mode", "ceil_mode", "auto_pad", "epsilon", "keepdims", "transA", "output_shape", "count_include_pad",
        ]  # fmt: skip
        value = _one_of(
            random,
            (
                int(_one_of(random, _HUGE)),
                [int(_one_of(random, _HUGE)) for _ in range(random.randint(6))] or [0],
                float(_one_of(random, (0.0, -1.0, float("nan"), float("inf"), 1e-45))),
                _one_of(random, ("SAME_UPPER", "VALID", "", "x" * 999, "cubic", "linear")),
                _tensor(random),
            ),
        )
        made = helper.make_attribute(_one_of(random, names), value)
        kept = [item for item in node.attribute if item.name != made.name]
        del node.attribute[:]
        node.attribute.extend([*kept, made])
        if random.randint(10) == 0:
            made = node.attribute[random.randint(len(node.attribute))]
            made.type = _one_of(random, list(AttributeProto.AttributeType.values()))


def _tensor(random: np.random.RandomState) -> TensorProto:
    kind = _one_of(random, (np.float32, np.int64, np.uint8, np.float16, np.bool_, np.float64))
    values = np.asarray([abs(int(_one_of(random, _HUGE))) % 2**7 for _ in range(random.randint(5))])
    return onnx.numpy_helper.from_array(values.astype(kind), "t")


def _initializer(random: np.random.RandomState, model: ModelProto) -> None:
    tensors = model.graph.initializer
    tensor = tensors[random.randint(len(tensors))]
    kind = random.randint(8)
    if kind == 0:
        tensor.data_type = random.randint(0, 26)
    elif kind == 1:
        tensor.dims[random.randint(len(tensor.dims))] = int(_one_of(random, _HUGE))
    elif kind == 2:
        tensor.dims.append(int(_one_of(random, _HUGE)))
    elif kind == 3:
        tensor.raw_data = tensor.raw_data[: random.randint(len(tensor.raw_data) + 1)]
    elif kind == 4:
        values = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], np.float32).copy()
        values[: random.randint(len(values) + 1)] = _one_of(random, (np.nan, np.inf, 3e38, 1e-45, 0.0))
        tensor.raw_data = values.tobytes()
    elif kind == 5:
        tensor.data_location = TensorProto.EXTERNAL if random.randint(2) else TensorProto.DEFAULT
        for key, value in (("location", _one_of(random, ("/etc/passwd", "../x", MANIFEST))), ("length", "9")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    elif kind == 6:
        tensors.add().CopyFrom(tensor)
    else:
        tensor.name = _one_of(random, _names(model))
        tensor.float_data.extend([0.5] * random.randint(5))


def _signature(random: np.random.RandomState, model: ModelProto) -> None:
    values = _one_of(random, (model.graph.input, model.graph.output, model.graph.value_info))
    if not values or random.randint(8) == 0:
        values.add().CopyFrom(_one_of(random, model.graph.input))
        values[-1].name = _one_of(random, _names(model))
        return
    value = values[random.randint(len(values))]
    kind = random.randint(4)
    if kind == 0:
        value.name = _one_of(random, _names(model))
    elif kind == 1:
        value.type.tensor_type.elem_type = random.randint(0, 26)
    elif kind == 2 and value.type.tensor_type.shape.dim:
        dims = value.type.tensor_type.shape.dim
        dims[random.randint(len(dims))].dim_value = int(_one_of(random, _HUGE))
    else:
        value.type.Clear() if random.randint(2) else value.type.tensor_type.shape.dim.add()


def _model_fields(random: np.random.RandomState, model: ModelProto) -> None:
    kind = random.randint(6)
    if kind == 0:
        model.ir_version = int(_one_of(random, _HUGE + tuple(range(1, 12))))
    elif kind == 1:
        model.opset_import[0].version = int(_one_of(random, _HUGE + tuple(range(1, 26))))
    elif kind == 2:
        entry = model.opset_import.add()
        entry.domain, entry.version = _one_of(random, ("", "ai.onnx", "evil", "com.microsoft")), random.randint(30)
    elif kind == 3:
        function = model.functions.add()
        function.name, function.domain = _one_of(random, ("Mul", "Relu")), _one_of(random, ("", "evil"))
    elif kind == 4:
        model.metadata_props.add().key = "x" * random.randint(1000)
    else:
        model.graph.sparse_initializer.add() if random.randint(2) else model.training_info.add()


def _work(random: np.random.RandomState, model: ModelProto) -> None:
    """An operator that makes much out of little, between two others."""
    nodes = [node for node in model.graph.node if node.input]
    if not nodes:
        return
    node = nodes[random.randint(len(nodes))]
    sizes = np.asarray([max(0, int(_one_of(random, _HUGE))) for _ in range(random.randint(1, 5))], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(sizes, "sizes"))
    kind = _one_of(random, ("Tile", "Expand", "ConstantOfShape", "Pad", "Reshape", "Range", "OneHot", "Resize"))
    inputs = ["sizes"] if kind == "ConstantOfShape" else [node.input[0], "sizes"]
    model.graph.node.insert(0, helper.make_node(kind, inputs, ["much"]))
    node.input[0] = "much"


EDITS: tuple[Callable[[np.random.RandomState, ModelProto], None], ...] = (
    _nodes, _operator, _wires, _attributes, _attributes, _initializer, _initializer, _signature, _model_fields, _work,
)  # fmt: skip
