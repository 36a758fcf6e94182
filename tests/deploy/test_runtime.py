from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image
from tiny_bundle import DIM, SIZE_HW, make_bundle

from siamese_deploy import OnnxVerifier
from siamese_deploy.bundle import Golden
from siamese_deploy.errors import BundleError, ImageError, IntegrityError, ProviderError, UsageError
from siamese_deploy.providers import ORT_NAMES


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
    assert verifier.score(embeddings[:0], embeddings[:0]).shape == (0,)


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
    ],
)
def test_wrong_embeddings_say_expected_and_got(verifier: OnnxVerifier, left: np.ndarray, right: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"expected two float32 \(P, 16\) or \(1, 16\)"):
        verifier.score(left, right)


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
