from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image, ImageOps
from tiny_bundle import DIM, SIZE_HW, make_bundle

from siamese_deploy import OnnxVerifier
from siamese_deploy.bundle import Golden, read_bundle
from siamese_deploy.errors import BundleError, ImageError, IntegrityError, ProviderError, UsageError
from siamese_deploy.providers import ORT_NAMES, nodes_by_provider, open_session, run_session


@pytest.fixture(scope="module")
def verifier(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu")


def random_images(n: int) -> np.ndarray:
    return np.random.RandomState(5).randint(0, 256, (n, *SIZE_HW, 3)).astype(np.uint8)


def test_embeds_any_number_of_pictures_alike(verifier: OnnxVerifier) -> None:
    images = random_images(21)  # the tiny bundle's largest batch is 8
    embeddings = verifier.embed(images)
    assert embeddings.shape == (21, DIM)
    assert embeddings.dtype == np.float32
    one_by_one = np.concatenate([verifier.embed(images[i : i + 1]) for i in range(21)])
    assert np.allclose(embeddings, one_by_one, rtol=1e-5, atol=1e-6)
    assert verifier.embed(images[:0]).shape == (0, DIM)
    assert np.array_equal(verifier.embed(images[:, ::-1, ::-1]), verifier.embed(images[:, ::-1, ::-1].copy()))


def test_scores_pairs_and_broadcasts_one_against_many(verifier: OnnxVerifier) -> None:
    embeddings = verifier.embed(random_images(6))
    scores = verifier.score(embeddings, embeddings[::-1])
    assert scores.shape == (6,)
    assert scores.dtype == np.float32
    assert ((scores > 0) & (scores < 1)).all()
    assert scores == pytest.approx(scores[::-1])  # the product does not know left from right
    one_to_many = verifier.score(embeddings[:1], embeddings)
    assert one_to_many == pytest.approx(verifier.score(np.repeat(embeddings[:1], 6, axis=0), embeddings))
    assert verifier.score(embeddings, embeddings[:1]) == pytest.approx(one_to_many)
    for n in (0, 1):
        assert verifier.score(embeddings[:0], embeddings[:n]).shape == (0,)
        assert verifier.score(embeddings[:n], embeddings[:0]).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, *SIZE_HW[::-1], 3), np.uint8),
        np.zeros((2, *SIZE_HW, 3), np.float32),
        np.zeros((*SIZE_HW, 3), np.uint8),
        np.zeros((2, 3, *SIZE_HW), np.uint8),
    ],
)
def test_wrong_pictures_say_expected_and_got(verifier: OnnxVerifier, images: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"expected uint8 \(N, 24, 32, 3\), got"):
        verifier.embed(images)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (np.zeros((2, DIM), np.float32), np.zeros((3, DIM), np.float32)),
        (np.zeros((2, DIM), np.float64), np.zeros((2, DIM), np.float64)),
        (np.zeros((2, DIM + 1), np.float32), np.zeros((2, DIM + 1), np.float32)),
        (np.zeros(DIM, np.float32), np.zeros(DIM, np.float32)),
        (np.float32(1), np.zeros((2, DIM), np.float32)),
        (np.zeros((2, DIM), np.float32), np.float32(1)),
    ],
)
def test_wrong_embeddings_say_expected_and_got(verifier: OnnxVerifier, left: np.ndarray, right: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"expected two float32 \(P, 16\) or \(1, 16\)"):
        verifier.score(left, right)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_runs_at_once_answer_to_the_bit_as_one(verifier: OnnxVerifier, tiny_bundle: Path, threads: int) -> None:
    images = random_images(21)
    embeddings = verifier.embed(images)
    many = OnnxVerifier(tiny_bundle, provider="cpu", throughput=True, threads=threads, max_batch=4)
    assert np.array_equal(many.embed(images), embeddings)
    assert np.array_equal(many.score(embeddings, embeddings[::-1]), verifier.score(embeddings, embeddings[::-1]))
    assert np.array_equal(many.score(embeddings[3:4], embeddings), verifier.score(embeddings[3:4], embeddings))


@pytest.mark.parametrize(
    ("threads", "max_batch", "batch_size"),
    [(1, 8, 8), (2, 8, 8), (2, 3, 3), (8, 8, 4), (16, 8, 2), (64, 8, 2), (64, 1, 1)],
)
def test_runs_at_once_are_small_where_there_are_many(
    tiny_bundle: Path, threads: int, max_batch: int, batch_size: int
) -> None:
    many = OnnxVerifier(tiny_bundle, provider="cpu", throughput=True, threads=threads, max_batch=max_batch)
    assert (many.calls_at_once, many.batch_size) == (threads, batch_size)


def test_a_batch_is_one_run_and_several_are_shared_out(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = OnnxVerifier(tiny_bundle, provider="cpu", throughput=True, threads=8)
    sizes: list[int] = []

    def counted(run: Callable[..., list[Any]], output: str, inputs: dict[str, Any], provider: str) -> Any:
        sizes.append(len(inputs["images"]))
        return run_session(run, output, inputs, provider)

    monkeypatch.setattr("siamese_deploy.runtime.run_session", counted)
    for n_pictures, expected in ((4, [4]), (5, [1, 4]), (40, [5] * 8)):
        sizes.clear()
        many.embed(random_images(n_pictures))
        assert sorted(sizes) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_batch": 9}, r"max_batch: expected 1 to 8 \(the bundle's\), got 9"),
        ({"max_batch": 0}, "max_batch: expected 1 to 8"),
        ({"threads": 0}, "threads: expected at least 1"),
        ({"gpu_memory_mb": -1}, "gpu_memory_mb: expected at least 1"),
    ],
)
def test_arguments_out_of_range(tiny_bundle: Path, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OnnxVerifier(tiny_bundle, **arguments)  # type: ignore[arg-type]


def test_embeddings_with_nan_have_no_score(verifier: OnnxVerifier) -> None:
    good = verifier.embed(random_images(3))
    bad = good.copy()
    bad[1, 2] = np.nan
    with pytest.raises(IntegrityError, match="NaN or outside"):
        verifier.score(bad, good)
    with pytest.raises(IntegrityError, match="NaN or outside"):
        verifier.score_placed(verifier.place(bad[1:2]), verifier.place(good))


def test_embeddings_that_stay_on_the_device_score_alike(verifier: OnnxVerifier, pictures: Path) -> None:
    """As on a GPU, with the CPU as the device."""
    images = random_images(5)
    embeddings = verifier.embed(images)
    placed = verifier.embed_placed(images)
    assert np.array_equal(placed.numpy(), embeddings)
    assert np.array_equal(verifier.score_placed(placed, placed), verifier.score(embeddings, embeddings))
    one = verifier.embed_placed(images[2:3])
    assert np.array_equal(verifier.score_placed(one, placed), verifier.score(embeddings[2:3], embeddings))
    two = pictures / "apple/0.png", pictures / "bolt/0.png"
    assert verifier._compare_placed(*two) == verifier.compare(*two)


def test_nodes_are_counted(verifier: OnnxVerifier, tiny_bundle: Path, tmp_path: Path) -> None:
    """Where ONNX Runtime can be asked, and by the profile of a run where it cannot."""
    bundle = read_bundle(tiny_bundle)
    session = open_session(bundle.head, "head.onnx", "cpu", profile_into=str(tmp_path))
    session.run(None, {"left": np.zeros((1, DIM), np.float32), "right": np.zeros((2, DIM), np.float32)})
    counts = nodes_by_provider(session)
    assert set(counts) == {"cpu"}
    assert 4 <= counts["cpu"] <= 5
    can_be_asked = hasattr(session, "get_provider_graph_assignment_info")
    assert list(tmp_path.iterdir()) == [] if can_be_asked else len(list(tmp_path.iterdir())) == 1
    assert verifier.nodes["head.onnx"] == (counts if can_be_asked else {})


def test_onnxruntime_tells_nobody(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """From 1.29 on it writes a device id and sends events, unless it is told not to before it is loaded."""
    code = "import sys; from siamese_deploy import OnnxVerifier; OnnxVerifier(sys.argv[1]).compare(*sys.argv[2:])"
    files = [tiny_bundle, pictures / "apple/0.png", pictures / "bolt/0.png"]
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home/cache")}
    (tmp_path / "home").mkdir()
    subprocess.run([sys.executable, "-c", code, *map(str, files)], env=environment | home, check=True)
    assert list((tmp_path / "home").rglob("*")) == []


def test_opened_in_several_threads_at_once(tiny_bundle: Path) -> None:
    """ONNX Runtime's chatter is kept off stdout while a session is opened; stdout belongs to all threads."""
    stdout = sys.stdout
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: OnnxVerifier(tiny_bundle, provider="cpu", threads=1), range(24)))
    assert sys.stdout is stdout
    assert len({verifier.model_digest for verifier in opened}) == 1


def test_a_picture_is_the_same_however_it_comes(verifier: OnnxVerifier, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    image = Image.open(pictures / "apple/0.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(path, exif=exif)
    other = pictures / "bolt/0.png"
    expected = verifier.compare(path, other)
    assert expected != verifier.compare(pictures / "apple/0.png", other)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        for same in (str(path), path.read_bytes(), opened, upright, np.asarray(upright)):
            assert verifier.compare(same, other) == expected
            assert verifier.compare(other, same) == expected
    for _ in range(5):
        with Image.open(path) as unread:  # two threads may not read it at once
            assert verifier.compare(unread, unread) == verifier.compare(path, path)
    grey = np.asarray(image.convert("L"))
    assert verifier.compare(grey, other) == verifier.compare(np.stack([grey] * 3, axis=2), other)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(pictures / "apple/0.png").convert("RGB")))


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        (np.zeros((40, 40, 3), np.float32), UsageError, r"uint8 array \(H, W, 3\) RGB or \(H, W\) grey, got float32"),
        (np.zeros((40, 40, 4), np.uint8), UsageError, r"got uint8 \(40, 40, 4\)"),
        (np.zeros((0, 0, 3), np.uint8), ImageError, "too small"),
        (7, UsageError, "got int"),
        (b"", ImageError, "empty"),
        ("a\0b.png", ImageError, "null byte"),
        (b"not a picture", ImageError, "not a picture of a supported format"),
        (Image.new("F", (40, 40)), ImageError, "no defined range"),
    ],
)
def test_what_is_no_picture(
    verifier: OnnxVerifier, pictures: Path, picture: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        verifier.compare(picture, pictures / "apple/0.png")  # type: ignore[arg-type]


def test_compares_two_files(verifier: OnnxVerifier, pictures: Path) -> None:
    score = verifier.compare(pictures / "apple/0.png", pictures / "bolt/0.png")
    assert 0 < score < 1
    assert score == verifier.compare(pictures / "bolt/0.png", str(pictures / "apple/0.png"))
    with pytest.raises(ImageError):
        verifier.compare(pictures / "apple/0.png", pictures / "absent.png")


def poison(model: onnx.ModelProto) -> None:
    weight = next(item for item in model.graph.initializer if item.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), "weight"))


def nudge(model: onnx.ModelProto) -> None:
    scale = next(item for item in model.graph.initializer if item.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 1.05, "scale"))


@pytest.mark.parametrize("change", [poison, nudge])
def test_golden_check_stops_a_network_that_answers_differently(change: object) -> None:
    with pytest.raises(IntegrityError, match="golden check failed on cpu"):
        OnnxVerifier(make_bundle(change), provider="cpu")  # type: ignore[arg-type]


def fix_batch_of_one(model: onnx.ModelProto) -> None:
    """The pooled values are reshaped to one row, so that two pictures fail while they run."""
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 24], np.int64), "one_row"))
    reshape = onnx.helper.make_node("Reshape", ["pooled", "one_row"], ["flat"])
    flatten.CopyFrom(reshape)


def test_a_failure_while_running_is_the_environments(capfd: pytest.CaptureFixture[str]) -> None:
    verifier = OnnxVerifier(make_bundle(fix_batch_of_one), provider="cpu")
    assert verifier.embed(random_images(1)).shape == (1, DIM)
    with pytest.raises(ProviderError, match=r"provider cpu: ONNX Runtime .* failed while running"):
        verifier.embed(random_images(2))
    assert capfd.readouterr().out == ""


def test_golden_check_looks_at_the_score_too() -> None:
    bundle = make_bundle()
    golden = Golden(bundle.manifest.golden.embedding, bundle.manifest.golden.score + 0.02)
    with pytest.raises(IntegrityError, match="golden check failed"):
        OnnxVerifier(replace(bundle, manifest=replace(bundle.manifest, golden=golden)), provider="cpu")


def test_graphs_that_do_not_fit_the_manifest_are_refused() -> None:
    bundle = make_bundle()
    with pytest.raises(BundleError, match=r"backbone\.onnx: expected"):
        OnnxVerifier(replace(bundle, backbone=bundle.head), provider="cpu")
    with pytest.raises(BundleError, match=r"head\.onnx: ONNX Runtime .* refuses it"):
        OnnxVerifier(replace(bundle, head=b"\x08\x0a garbage"), provider="cpu")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_named_provider_that_is_not_there_is_an_error(tiny_bundle: Path, provider: str) -> None:
    if ORT_NAMES[provider] in onnxruntime.get_available_providers():
        pytest.skip("the installed ONNX Runtime has this provider compiled in")
    with pytest.raises(ProviderError, match=rf"the installed ONNX Runtime .* has no {ORT_NAMES[provider]}; run: pip"):
        OnnxVerifier(tiny_bundle, provider=provider)


def test_auto_says_what_it_passed_over(tiny_bundle: Path) -> None:
    verifier = OnnxVerifier(tiny_bundle)
    if verifier.provider == "cpu":
        assert "cuda passed over: " in verifier.provider_note
    with pytest.raises(UsageError, match="expected one of auto, cpu, cuda, tensorrt"):
        OnnxVerifier(tiny_bundle, provider="gpu")


def test_nothing_is_printed_and_torch_is_not_needed(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules.update(torch=None, torchvision=None, onnx=None, siamese_train=None)\n"
        "from siamese_deploy import OnnxVerifier\n"
        "OnnxVerifier(sys.argv[1]).compare(sys.argv[2], sys.argv[2])"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tiny_bundle), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
