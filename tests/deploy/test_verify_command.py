from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import onnx
import pytest
from conftest import RunCommand, assert_refused
from onnx import numpy_helper
from tiny_bundle import SIZE_HW, make_bundle

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.cache_file import FILE_NAME
from siamese_deploy.cli import main as siamese
from siamese_deploy.errors import IntegrityError
from siamese_deploy.preprocess import Preprocess, load_image


def test_decides_by_the_bundles_threshold_or_the_given_one(run: RunCommand, pictures: Path, tiny_bundle: Path) -> None:
    pair = (pictures / "apple/0.png", pictures / "bolt/1.png")
    score = OnnxVerifier(tiny_bundle, provider="cpu").compare(*pair)
    expected = (0, "match: score ") if score >= 0.5 else (10, "no match: score ")
    result = run(siamese, "verify", *pair, "-c", tiny_bundle, "--provider", "cpu")
    assert (result.exit_code, result.stdout.startswith(expected[1])) == (expected[0], True)
    assert f"{score:.4f}, threshold 0.5000" in result.stdout
    assert result.stderr == ""
    for threshold, exit_code in ((0, 0), (score, 0), (score + 1e-6, 10), (1, 10)):
        result = run(siamese, "verify", *pair, "-c", tiny_bundle, "--threshold", threshold)
        assert (result.exit_code, result.stdout.startswith("match")) == (exit_code, exit_code == 0)


@pytest.mark.parametrize("what", ["verify", "identify"])
def test_a_cache_that_fails_is_told_and_costs_no_answer(
    what: str, run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    command = ["verify", pictures / "apple/0.png", pictures / "bolt/1.png"]
    if what == "identify":
        Gallery(tmp_path / "gallery", OnnxVerifier(tiny_bundle, provider="cpu"), create=True)
        command = ["gallery", "identify", tmp_path / "gallery", pictures / "bolt/1.png"]
    command += ["-c", tiny_bundle, "--provider", "cpu", "--cache", tmp_path / "cache"]
    first = run(siamese, *command)
    file = tmp_path / "cache" / FILE_NAME
    with closing(sqlite3.connect(file)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'embeddings'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    data = bytearray(file.read_bytes())
    data[(page - 1) * size : page * size] = b"\xff" * size
    file.write_bytes(data)
    second = run(siamese, *command)
    assert (second.exit_code, second.stdout) == (first.exit_code, first.stdout)
    assert (first.stderr, second.stderr.count("embeddings are no longer cached")) == ("", 1)


def test_whatever_goes_wrong_is_neither_match_nor_no_match(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    good = pictures / "apple/0.png"
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:200])
    for left, right in ((good, tmp_path / "absent.png"), (tmp_path / "bad.png", good), (good, pictures)):
        assert_refused(run(siamese, "verify", left, right, "-c", tiny_bundle, "--threshold", 0), 3)
    assert_refused(run(siamese, "verify", good, good, "-c", tmp_path / "absent"), 3, "no such bundle")
    assert_refused(run(siamese, "verify", good, good, "-c", tmp_path), 4, "is no bundle")
    assert_refused(run(siamese, "verify", good, "-c", tiny_bundle), 2, "RIGHT")
    for threshold in ("nan", "-0.1", "1.1", "x"):
        result = run(siamese, "verify", good, good, "-c", tiny_bundle, "--threshold", threshold)
        assert_refused(result, 2, "--threshold")
    assert_refused(run(siamese, "verify", good, good, "-c", tiny_bundle, "--provider", "tensorrt"), 5)


def overflow_beyond_the_golden_picture(model: onnx.ModelProto) -> None:
    """A bias that turns white pictures, and not the golden one, into NaN."""
    nodes = list(model.graph.node)
    # sqrt(limit - max of the picture): negative only where a whole 4x4 patch is white
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.np.float32(1.9), "limit"))
    pooled = onnx.helper.make_node("AveragePool", ["normalised"], ["patches"], kernel_shape=[16, 16])
    peak = onnx.helper.make_node("ReduceMax", ["patches"], ["peak"], keepdims=0)
    room = onnx.helper.make_node("Sub", ["limit", "peak"], ["room"])
    root = onnx.helper.make_node("Sqrt", ["room"], ["root"])
    zero = onnx.helper.make_node("Sub", ["root", "root"], ["nan_or_zero"])
    last = onnx.helper.make_node("Add", ["product", "nan_or_zero"], ["embeddings"])
    nodes[-1].output[0] = "product"
    del model.graph.node[:]
    model.graph.node.extend([*nodes, pooled, peak, room, root, zero, last])


def test_nan_is_never_a_match(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    from PIL import Image

    make_bundle(overflow_beyond_the_golden_picture).write(tmp_path / "bundle")
    Image.new("RGB", (40, 40), (255, 255, 255)).save(tmp_path / "white.png")
    good = pictures / "apple/0.png"
    assert run(siamese, "verify", good, good, "-c", tmp_path / "bundle").exit_code in (0, 10)
    result = run(siamese, "verify", tmp_path / "white.png", good, "-c", tmp_path / "bundle", "--threshold", 0)
    assert_refused(result, 4, "white.png: the network gives no finite embedding")
    white = load_image(tmp_path / "white.png", Preprocess(SIZE_HW))[None]
    with pytest.raises(IntegrityError, match="no finite embedding"):
        OnnxVerifier(tmp_path / "bundle", provider="cpu").embed_placed(white)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_says_what_the_exit_codes_mean(run: RunCommand, option: str) -> None:
    assert "0 means match, 10 no match" in " ".join(run(siamese, "verify", option).stdout.split())
