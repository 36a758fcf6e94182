"""Bundles that are wrong, networks that answer nonsense, an ONNX Runtime that fails: an error, never a match."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import RunCommand, assert_refused
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image
from tiny_bundle import DIM, SIZE_HW, make_bundle

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.bundle import HEAD, MANIFEST, read_bundle
from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.runtime_options import describe
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import BundleError, IntegrityError, ProviderError
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.providers import ORT_NAMES, open_session

SIAMESE = "from siamese_deploy.cli import main; main()"


@pytest.fixture
def bundle_path(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def verify_apart(bundle: Path, *pictures: Path, before: str = "", limit_bytes: int = 0) -> tuple[int, str, list[str]]:
    """`siamese verify` at threshold 0 in a process of its own: exit code, stdout, and the lines of stderr."""

    def limit() -> None:
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))

    command = [sys.executable, "-c", f"{before}\n{SIAMESE}", "verify", *map(str, pictures), "-c", str(bundle)]
    options = ("--threshold", "0", "--provider", "cpu", "--no_cache")
    done = subprocess.run([*command, *options], capture_output=True, text=True, preexec_fn=limit)
    return done.returncode, done.stdout, done.stderr.splitlines()


# --- manifests -----------------------------------------------------------------------------------------------------


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As somebody does who knows the format: the manifest's hash fits again."""
    value = json.loads((bundle / MANIFEST).read_text())
    del value["manifest_sha256"]
    change(value)

    def canonical() -> bytes:
        return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()

    value["manifest_sha256"] = hashlib.sha256(canonical()).hexdigest()
    (bundle / MANIFEST).write_bytes(canonical())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("format"), "format: expected str, got NoneType"),
        (lambda m: m.pop("threshold"), "threshold: expected dict"),
        (lambda m: m["threshold"].pop("value"), "value: expected float, got NoneType"),
        (lambda m: m["threshold"].update(value="0.5"), "value: expected float, got str"),
        (lambda m: m["threshold"].update(value=True), "value: expected float, got bool"),
        (lambda m: m["threshold"].update(value=float("nan")), "not canonical JSON"),
        (lambda m: m["threshold"].update(value=-0.1), "expected a number in"),
        (lambda m: m["threshold"].update(value=1.5), "expected a number in"),
        (lambda m: m.update(backbone=["resnet18"]), "backbone: expected str"),
        (lambda m: m.update(embedding_dim="16"), "embedding_dim: expected int"),
        (lambda m: m.update(batch=[1, 4, 8]), "batch: expected dict"),
        (lambda m: m.update(about=[]), "about: expected dict"),
        (lambda m: m.update(files=[]), "files: expected dict"),
        (lambda m: m["files"].pop(HEAD), "head.onnx: damaged"),
        (lambda m: m["preprocess"].update(mean=[0.5, 0.5, 0.5]), "preprocess: expected"),
        (lambda m: m["golden"].update(rule="ramp-v2"), "golden.rule: expected 'ramp-v1'"),
        (lambda m: m["golden"].update(embedding_float32_base64="*" * 88), "golden embedding: expected 16 numbers"),
        (lambda m: m["golden"].update(embedding_float32_base64="AAA="), "manifest.json: "),
    ],
)
def test_a_manifest_whose_hash_fits_is_checked_all_the_same(
    run: RunCommand, bundle_path: Path, pictures: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewrite_manifest(bundle_path, change)
    picture = pictures / "apple/0.png"
    result = run(siamese, "verify", picture, picture, "-c", bundle_path, "--threshold", 0)
    assert_refused(result, 4, words)
    assert result.stdout == ""


def test_an_archive_is_no_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for file in tiny_bundle.iterdir():
            archive.write(file, file.name)
    with pytest.raises(BundleError, match="is a file; expected a bundle folder"):
        read_bundle(tmp_path / "bundle.zip")


def test_a_file_of_two_gigabytes_is_refused_unread(bundle_path: Path) -> None:
    os.truncate(bundle_path / HEAD, 2**31)  # no room is taken on the disk
    with pytest.raises(BundleError, match=r"head\.onnx: expected a plain file of at most 2,147,483,647 bytes"):
        read_bundle(bundle_path)


# --- what was checked is what runs ---------------------------------------------------------------------------------


def test_the_bytes_that_were_hashed_are_the_bytes_that_run(
    bundle_path: Path, other_bundle: Path, tiny_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another bundle is put in its place after the check, and the folder is removed while it is in use."""
    from siamese_deploy import bundle as module

    pair = pictures / "apple/0.png", pictures / "bolt/0.png"
    expected = OnnxVerifier(tiny_bundle, provider="cpu").compare(*pair)
    assert OnnxVerifier(other_bundle, provider="cpu").compare(*pair) != expected
    check = module.check_graph

    def check_then_exchange(name: Path, graph: bytes) -> None:
        check(name, graph)
        if name.name == HEAD:
            shutil.rmtree(bundle_path)
            shutil.copytree(other_bundle, bundle_path)

    monkeypatch.setattr(module, "check_graph", check_then_exchange)
    verifier = OnnxVerifier(bundle_path, provider="cpu")
    assert (bundle_path / HEAD).read_bytes() == (other_bundle / HEAD).read_bytes()
    assert verifier.compare(*pair) == expected
    shutil.rmtree(bundle_path)
    assert verifier.compare(*pair) == expected


def test_links_to_the_folder_are_followed_and_second_names_are_only_names(bundle_path: Path, tmp_path: Path) -> None:
    digest = read_bundle(bundle_path).digest
    (tmp_path / "current").symlink_to(bundle_path)
    os.link(bundle_path / HEAD, tmp_path / "second-name")
    assert read_bundle(tmp_path / "current").digest == digest
    with open(tmp_path / "second-name", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(BundleError, match=r"head\.onnx: damaged"):
        read_bundle(tmp_path / "current")


def test_names_in_a_manifest_are_never_opened(bundle_path: Path) -> None:
    """To open one of these would be an error."""
    names = ("../absent", "/proc/absent", "a\0b", "..")
    rewrite_manifest(bundle_path, lambda manifest: manifest["files"].update(dict.fromkeys(names, "0" * 64)))
    assert read_bundle(bundle_path).digest == make_bundle().digest


@pytest.mark.parametrize("location", ["manifest.json", "../outside", "/etc/hostname", "a/../../outside"])
def test_weights_outside_the_graph_are_refused_wherever_they_are(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside").write_bytes(bytes(4 * DIM * 24))

    def move_out(model: ModelProto) -> None:
        weight = next(item for item in model.graph.initializer if item.name == "weight")
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)

    make_bundle(move_out).write(tmp_path / "bundle")
    with pytest.raises(BundleError, match="tensor 'weight' keeps its data outside the file"):
        read_bundle(tmp_path / "bundle")


# --- graphs that do not fit ----------------------------------------------------------------------------------------


def edited(graph: bytes, change: Callable[[ModelProto], object]) -> bytes:
    model = onnx.load_model_from_string(graph)
    change(model)
    return model.SerializeToString()


def renamed(old: str, new: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    return change


def with_weight(name: str, shape: tuple[int, int]) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        weight = next(item for item in model.graph.initializer if item.name == name)
        weight.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), name))
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = shape[1]

    return change


def input_shape(*shape: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *shape])
        model.graph.input[0].CopyFrom(images)

    return change


def float_pictures(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("backbone", renamed("images", "pixels")),
        ("backbone", renamed("embeddings", "features")),
        ("backbone", float_pictures),
        ("backbone", input_shape(*SIZE_HW[::-1], 3)),
        ("backbone", input_shape(3, *SIZE_HW)),
        ("backbone", with_weight("weight", (24, DIM - 1))),
        ("head", renamed("left", "a")),
        ("head", renamed("scores", "distances")),
        ("head", with_weight("w2", (8, 2))),
    ],
    ids=["input", "output", "dtype", "height-width", "layout", "dim", "side", "scores", "columns"],
)
def test_names_types_and_shapes_are_those_of_the_manifest(name: str, change: Callable[[ModelProto], object]) -> None:
    bundle = make_bundle()
    graph = edited(getattr(bundle, name), change)
    with pytest.raises(BundleError, match=rf"{name}\.onnx: (expected|ONNX Runtime .* refuses it)"):
        OnnxVerifier(replace(bundle, **{name: graph}), provider="cpu")


def test_graphs_of_two_networks_are_no_bundle(bundle_path: Path, tmp_path: Path) -> None:
    """A head that was trained with another backbone: as a file, and with all hashes made anew."""

    def other(model: ModelProto) -> None:
        weight = next(item for item in model.graph.initializer if item.name == "w2")
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), "w2"))

    bundle = make_bundle()
    mixed = replace(bundle, head=edited(bundle.head, other))
    (bundle_path / HEAD).write_bytes(mixed.head)
    with pytest.raises(BundleError, match=r"head\.onnx: damaged"):
        read_bundle(bundle_path)
    mixed.write(tmp_path / "mixed")
    with pytest.raises(IntegrityError, match="golden check failed"):
        OnnxVerifier(tmp_path / "mixed", provider="cpu")


_MUTANTS = """
import collections, random, sys
from dataclasses import replace
from siamese_deploy import OnnxVerifier
from siamese_deploy.bundle import read_bundle
from siamese_deploy.errors import BundleError, IntegrityError
from siamese_deploy.graph_check import check_graph
bundle, chance, ends = read_bundle(sys.argv[1]), random.Random(0), collections.Counter()
for number in range(int(sys.argv[2])):
    name = chance.choice(("backbone", "head"))
    graph = bytearray(getattr(bundle, name))
    for _ in range(chance.choice((1, 1, 2, 5))):
        limit = len(graph) if chance.random() < 0.3 else min(len(graph), 900)
        graph[chance.randrange(limit)] ^= 1 << chance.randrange(8)
    graph = bytes(graph[: chance.randrange(len(graph)) if chance.random() < 0.1 else None])
    try:
        if number % 2:  # the other half as if nobody had looked at it before
            check_graph(name, graph)
        OnnxVerifier(replace(bundle, **{name: graph}), provider="cpu", threads=1)
        ends["runs"] += 1
    except (BundleError, IntegrityError) as error:
        assert "\\n" not in str(error), error
        ends["refused"] += 1
print(ends["runs"], ends["refused"])
"""


def test_whatever_the_bytes_of_a_graph_the_end_is_an_error_of_ours(tiny_bundle: Path) -> None:
    """SIAMESE_MUTANTS=20000 for the long version. That some still run is why the hashes are there."""
    number = int(os.environ.get("SIAMESE_MUTANTS", "150"))
    command = [sys.executable, "-W", "error", "-c", _MUTANTS, str(tiny_bundle), str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    runs, refused = map(int, done.stdout.split())
    assert runs + refused == number
    assert runs > number / 10


def test_numbers_whose_squares_overflow_are_refused_without_a_warning() -> None:
    def enlarge(model: ModelProto) -> None:
        weight = next(item for item in model.graph.initializer if item.name == "weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e25), "weight"))

    with pytest.raises(IntegrityError, match="golden check failed on cpu: relative embedding error 1e"):
        OnnxVerifier(make_bundle(enlarge), provider="cpu")


@pytest.mark.parametrize("where", ["scores", "hidden"])
def test_names_that_are_not_utf8_are_an_error_of_ours(where: str) -> None:
    bundle = make_bundle()
    broken = where.encode()[:-1] + b"\xe7"
    at = bundle.head.index(where.encode())  # one of two places: the other still names what is there no longer
    places = bundle.head[:at] + broken + bundle.head[at + len(where) :] if where == "hidden" else None
    graph = places or bundle.head.replace(where.encode(), broken)
    with pytest.raises(BundleError, match=r"head\.onnx: "):
        OnnxVerifier(replace(bundle, head=graph), provider="cpu")


# --- an ONNX Runtime that dies, or has no memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "death", "status"),
    [("__init__", "os.abort()", -6), ("run", "os.kill(os.getpid(), signal.SIGSEGV)", -11), ("run", "0", 0)],
    ids=["abort", "segfault", "alive"],
)
def test_who_is_killed_within_onnx_runtime_has_not_matched(
    tiny_bundle: Path, pictures: Path, method: str, death: str, status: int
) -> None:
    before = (
        "import os, signal, onnxruntime\n"
        f"original = onnxruntime.InferenceSession.{method}\n"
        f"onnxruntime.InferenceSession.{method} = lambda *values, **more: [{death}, original(*values, **more)][1]"
    )
    exit_code, stdout, _ = verify_apart(tiny_bundle, *[pictures / "apple/0.png"] * 2, before=before)
    assert (exit_code, stdout[:6]) == (status, "" if status else "match:")


def four_tebibytes(model: ModelProto) -> None:
    """Between the pixels and the embedding: the largest of 2^40 copies of a number."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**20], np.int64), "much"))
    nodes = list(model.graph.node)
    nodes[-1].output[0] = "product"
    added = [
        helper.make_node("ReduceMax", ["normalised"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "much"], ["copies"]),
        helper.make_node("ReduceMin", ["copies"], ["least"], keepdims=0),
        helper.make_node("Sub", ["least", "one"], ["zero"]),
        helper.make_node("Add", ["product", "zero"], ["embeddings"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *added])


def test_a_graph_that_wants_more_memory_than_there_is(pictures: Path, tmp_path: Path) -> None:
    make_bundle(four_tebibytes).write(tmp_path / "bundle")
    picture = pictures / "apple/0.png"
    exit_code, stdout, lines = verify_apart(tmp_path / "bundle", picture, picture, limit_bytes=2**33)
    assert (exit_code, stdout, len(lines)) == (5, "", 1)
    assert "failed while running" in lines[0]
    assert "free memory" in lines[0]


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_session_that_came_out_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """ONNX Runtime itself only warns; here also where the list of its providers would have let it pass."""
    if ORT_NAMES[provider] in onnxruntime.get_available_providers():
        pytest.skip("the installed ONNX Runtime has this provider compiled in")
    monkeypatch.setattr("siamese_deploy.providers.require_compiled_in", lambda _: None)
    with pytest.raises(ProviderError, match=f"provider {provider}: "):
        open_session(make_bundle().head, "head.onnx", provider)


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        ("cpu", "std::bad_alloc"),
        ("cpu", "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 42"),
        ("cpu", "PosixThread pthread_create failed, error code: 11"),
        ("cuda", "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"),
    ],
)
def test_no_memory_for_a_graph_is_the_environments_fault_and_not_the_bundles(
    monkeypatch: pytest.MonkeyPatch, provider: str, text: str
) -> None:
    """With a session that fails as real ones do; how a GPU without memory fails was not seen yet."""
    graph, asked = make_bundle().head, []

    def fail(*_: object, providers: list[tuple[str, dict[str, str]]], **__: object) -> None:
        asked.append(providers[0])
        raise RuntimeError(text)

    monkeypatch.setattr("siamese_deploy.providers.require_compiled_in", lambda _: None)
    monkeypatch.setattr("siamese_deploy.providers._why_unavailable", lambda _: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ProviderError, match=r"head\.onnx") as caught:
        open_session(graph, "head.onnx", provider, gpu_memory_bytes=64 * 2**20)
    assert text[:20] in str(caught.value)
    assert asked[0][0] == ORT_NAMES[provider]
    assert asked[0][1].get("gpu_mem_limit") == (str(64 * 2**20) if provider == "cuda" else None)


def test_nodes_that_stay_on_the_cpu_are_told(tiny_bundle: Path) -> None:
    """Of a verifier that says so of itself: here is no GPU."""
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    verifier.provider, verifier.nodes = "cuda", {"backbone.onnx": {"cuda": 60, "cpu": 2}, "head.onnx": {"cuda": 9}}
    assert describe(verifier) == "provider: cuda (onnxruntime; 2 nodes on cpu; 69 nodes on cuda)"


# --- embeddings that say nothing -----------------------------------------------------------------------------------


def dead_on_white_pictures(model: ModelProto) -> None:
    """All numbers are zero where a large part of the picture is white, as of a network whose last units have died."""
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.9), "limit"))
    nodes = list(model.graph.node)
    nodes[-1].output[0] = "product"
    added = [
        helper.make_node("AveragePool", ["normalised"], ["patches"], kernel_shape=[16, 16]),
        helper.make_node("GlobalMaxPool", ["patches"], ["peaks"]),
        helper.make_node("Flatten", ["peaks"], ["peaks of channels"]),
        helper.make_node("ReduceMax", ["peaks of channels", "last axis"], ["peak"], keepdims=1),
        helper.make_node("Sub", ["limit", "peak"], ["room"]),
        helper.make_node("Relu", ["room"], ["room or 0"]),
        helper.make_node("Sign", ["room or 0"], ["alive"]),
        helper.make_node("Mul", ["product", "alive"], ["embeddings"]),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "last axis"))
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *added])


@pytest.fixture
def white(tmp_path: Path) -> Path:
    (tmp_path / "white").mkdir()
    Image.new("RGB", (40, 40), (255, 255, 255)).save(tmp_path / "white/white.png")
    return tmp_path / "white/white.png"


@pytest.fixture
def dying(tmp_path: Path) -> Path:
    make_bundle(dead_on_white_pictures).write(tmp_path / "dying")
    return tmp_path / "dying"


DOORS: dict[str, Callable[[Gallery, OnnxVerifier, Path, Path], object]] = {
    "compare left": lambda _, verifier, white, good: verifier.compare(white, good),
    "compare right": lambda _, verifier, white, good: verifier.compare(good, white),
    "compare with itself": lambda _, verifier, white, __: verifier.compare(white, white),
    "compare on the device": lambda _, verifier, white, good: verifier._compare_placed(good, white),
    "enrol": lambda gallery, _, white, good: gallery.enrol("new", [good, white]),
    "enrol a folder": lambda gallery, _, white, __: gallery.enrol_folder(scan_image_folder(white.parent.parent)),
    "identify": lambda gallery, _, white, __: gallery.identify(white, threshold=0),
    "verify a name": lambda gallery, _, white, __: gallery.verify(white, "bolt"),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_embedding_of_zeros_decides_nothing_and_is_not_enrolled(
    dying: Path, white: Path, pictures: Path, tmp_path: Path, door: str
) -> None:
    """Its product with any other is zero, so that it would be as like one as another; fresh and from the cache."""
    verifier = OnnxVerifier(dying, provider="cpu", cache=EmbeddingCache(tmp_path / "cache"))
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    gallery.enrol("bolt", [pictures / "bolt/0.png"])
    before = gallery.store.pictures()
    good = pictures / "apple/0.png"
    for _ in range(2):
        with pytest.raises(IntegrityError, match="gives an embedding of zeros, which tells nobody from another"):
            DOORS[door](gallery, verifier, white, good)
    assert gallery.store.pictures() == before


def test_an_embedding_of_zeros_is_neither_match_nor_no_match(
    run: RunCommand, dying: Path, white: Path, pictures: Path, tmp_path: Path
) -> None:
    good, gallery = pictures / "apple/0.png", tmp_path / "gallery"
    assert run(siamese, "gallery", "enrol", gallery, good, "--name", "a", "-c", dying).exit_code == 0
    for command in (
        ("verify", white, good),
        ("verify", good, white),
        ("gallery", "identify", gallery, white),
        ("gallery", "enrol", gallery, white, "--name", "w"),
    ):
        threshold = () if "enrol" in command else ("--threshold", 0)
        assert_refused(
            run(siamese, *command, "-c", dying, "--provider", "cpu", *threshold), 4, "white.png: the network"
        )


def test_an_edited_picture_is_embedded_anew_whatever_its_date_says(tiny_bundle: Path, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    cached, plain = (OnnxVerifier(tiny_bundle, provider="cpu", cache=c) for c in (cache, None))
    picture, other = tmp_path / "picture.bmp", tmp_path / "other.bmp"
    random = np.random.RandomState(3)
    for path in (other, picture):
        Image.fromarray(random.randint(0, 256, (24, 32, 3)).astype(np.uint8)).save(path)
    first, status = cached.compare(picture, other), picture.stat()
    Image.fromarray(random.randint(0, 256, (24, 32, 3)).astype(np.uint8)).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (picture.stat().st_size, picture.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert cached.compare(picture, other) == plain.compare(picture, other) != first
    assert (cache.hits, cache.misses) == (1, 3)  # the other picture was known
