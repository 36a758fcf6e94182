"""`siamese-train-bench`: PyTorch's routes and bundles in one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import RunCommand, assert_refused
from networks import SMALL, own_checkpoint, random_network

from siamese_deploy import read_bundle
from siamese_deploy.bench import run as run_module
from siamese_deploy.bench import scenarios
from siamese_deploy.verifier import Embeddings, Scores
from siamese_export.export import export_checkpoint
from siamese_train import bench
from siamese_train.checkpoint import read_checkpoint
from siamese_train.cli import train_bench_main

QUICK = ("--min_seconds", 0.003, "--gallery_rows", 10, "--pairs", 6, "--threads", 1)
SCENARIOS = ["SingleStream", "MultiStream", "Offline", "cached pairs", "identify"]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch has CUDA")

TrainBench = Callable[..., Result]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pth", random_network(), *SMALL)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "bundle"
    export_checkpoint(checkpoint, path)
    return path


@pytest.fixture(autouse=True)
def _fewer_cached_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of 1,000 numbers each take most of the time here and show nothing more."""
    for module in (run_module, scenarios):
        monkeypatch.setattr(module, "CACHED_PAIRS", 64)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes many seconds."""
    monkeypatch.setattr(bench, "_ROUTES", tuple(one for one in bench._ROUTES if not one[0].compiled))


@pytest.fixture
def train_bench(run: RunCommand, pictures: Path, checkpoint: Path) -> TrainBench:
    return lambda *options: run(train_bench_main, "-c", checkpoint, "-v", pictures, *QUICK, *options)


def rows_of(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By name and provider, in the order of the table."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in json.loads((folder / "bench.json").read_text("ascii"))["rows"]:
        rows.setdefault((row["bundle"], row["provider"]), []).append(row)
    return rows


def claiming(bundle: Path, checkpoint: Path, target: Path) -> Path:
    """The bundle with a manifest that says it was exported from `checkpoint`."""
    read = read_bundle(bundle)
    about = read.manifest.about | {"checkpoint": {"sha256": read_checkpoint(checkpoint).sha256, "epoch": 3}}
    replace(read, manifest=replace(read.manifest, about=about)).write(target)
    return target


@pytest.mark.usefixtures("eager_only")
def test_pytorch_and_a_bundle_stand_in_one_table(
    train_bench: TrainBench, checkpoint: Path, bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = train_bench(bundle, tiny_bundle, "--batch", 2, "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = rows_of(out)
    # The other network's scores are its own: nothing says that it comes from this checkpoint.
    assert list(rows) == [
        ("best.pth", "torch cpu eager"), ("best.pth", "torch cpu channels-last"), ("bundle", "cpu"), ("tiny", "cpu"),
    ]  # fmt: skip
    for (name, provider), found in rows.items():
        assert [row["scenario"] for row in found] == SCENARIOS, provider
        assert {row["status"] for row in found} <= {"ok", "unstable"}, found
        assert {row["precision"] for row in found} == {"fp32"}
        digest = read_checkpoint(checkpoint).sha256 if name == "best.pth" else found[0]["bundle_digest"]
        assert {row["bundle_digest"] for row in found} == {digest}
        assert all(row["pairs_per_s"] > 0 for row in found)
        assert found[2]["batch"] == 2
    versions = json.loads((out / "bench.json").read_text())["machine"]["versions"]
    assert {
        "torch": metadata.version("torch"),
        "torchvision": metadata.version("torchvision"),
    }.items() <= versions.items()
    for line in ("best.pth  fp32       torch cpu channels-last", "bundle    fp32       cpu"):
        assert line in result.stdout


@pytest.mark.usefixtures("eager_only")
def test_a_bundle_that_answers_unlike_its_checkpoint_is_wrong(
    train_bench: TrainBench, checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    false = claiming(tiny_bundle, checkpoint, tmp_path / "false")
    result = train_bench(false, "-o", tmp_path / "out")
    assert_refused(result, 4, "1 rows are wrong", "false cpu all: scores differ from the checkpoint's by up to")
    rows = rows_of(tmp_path / "out")
    assert [(row["scenario"], row["status"], row["queries"]) for row in rows["false", "cpu"]] == [("all", "wrong", 0)]
    assert all(row["status"] in ("ok", "unstable") for row in rows["best.pth", "torch cpu eager"])


class OffForOnePair(bench.RoutedVerifier):
    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        scores = super().score(left, right)
        return scores + np.float32(5e-5) if len(scores) == 1 and self.route.channels_last else scores


@pytest.mark.usefixtures("eager_only")
def test_a_route_with_other_scores_than_the_evaluation_is_wrong(
    train_bench: TrainBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RoutedVerifier", OffForOnePair)
    result = train_bench("-o", tmp_path / "out")
    assert_refused(result, 4, "1 rows are wrong", "torch cpu channels-last SingleStream", "scores differ")
    rows = rows_of(tmp_path / "out")
    assert [row["status"] == "wrong" for row in rows["best.pth", "torch cpu channels-last"]] == [True, *[False] * 4]
    assert not any(row["status"] == "wrong" for row in rows["best.pth", "torch cpu eager"])


@NO_CUDA
@pytest.mark.usefixtures("eager_only")
def test_cuda_that_is_not_there_is_a_reason_in_the_table(train_bench: TrainBench, bundle: Path, tmp_path: Path) -> None:
    result = train_bench(bundle, "--provider", "cuda", "--provider", "cpu", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "out")
    routes = ("eager", "channels-last", "channels-last amp-fp16", "channels-last amp-bf16")
    for provider in [f"torch cuda {route}" for route in routes]:
        (row,) = rows["best.pth", provider]
        assert (row["scenario"], row["status"]) == ("all", "failed")
        assert row["reason"] == f"provider cuda: PyTorch {torch.__version__} sees no CUDA device"
    assert "no CUDAExecutionProvider" in rows["bundle", "cuda"][0]["reason"]
    assert all(row["status"] in ("ok", "unstable") for row in rows["bundle", "cpu"])
    result = train_bench(bundle, "--provider", "cuda")
    assert_refused(result, 5, "no row worked", "sees no CUDA device")


def test_what_is_no_checkpoint_or_no_bundle_is_said_before_anything_is_measured(
    train_bench: TrainBench, run: RunCommand, pictures: Path, checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    assert_refused(train_bench(tmp_path / "none"), 3, "none")
    assert_refused(train_bench(pictures), 4, "manifest.json")
    assert_refused(run(train_bench_main, "-c", bundle / "head.onnx", "-v", pictures), 4, "head.onnx")
    assert_refused(run(train_bench_main, "-c", tmp_path / "none.pth", "-v", pictures), 3, "none.pth")
    result = train_bench(bundle, "--expect_digest", "0" * 64)
    assert_refused(result, 4, str(bundle))
    assert "--checkpoint" in run(train_bench_main, "-v", pictures).stderr


def compiled_rows(
    tmp_path: Path, checkpoint: Path, pictures: Path, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """By provider; in a process of its own, since PyTorch remembers what it compiled."""
    start = "from siamese_train.cli import train_bench_main; train_bench_main()"
    options = ["-c", checkpoint, "-v", pictures, *QUICK, "--batch", 2, "-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, options)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")} | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {provider: found for (_, provider), found in rows_of(tmp_path / "out").items()}


@pytest.mark.slow
def test_compiled_rows_have_the_evaluations_scores(tmp_path: Path, checkpoint: Path, pictures: Path) -> None:
    rows = compiled_rows(tmp_path, checkpoint, pictures)["torch cpu channels-last compile"]
    assert [row["scenario"] for row in rows] == SCENARIOS
    assert {row["status"] for row in rows} <= {"ok", "unstable"}, rows
    assert max(row["score_difference"] for row in rows) <= 1e-5


@pytest.mark.slow
def test_without_a_compiler_only_the_compiled_row_is_lost(tmp_path: Path, checkpoint: Path, pictures: Path) -> None:
    rows = compiled_rows(tmp_path, checkpoint, pictures, CXX=str(tmp_path / "no-compiler"))
    (lost,) = rows.pop("torch cpu channels-last compile")
    assert (lost["scenario"], lost["status"]) == ("all", "failed")
    assert lost["reason"].startswith("PyTorch: ")
    assert "compiler" in lost["reason"].lower()
    assert list(rows) == ["torch cpu eager", "torch cpu channels-last"]
    assert all(row["status"] in ("ok", "unstable") for found in rows.values() for row in found)
