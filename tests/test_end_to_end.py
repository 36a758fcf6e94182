"""Train, export, evaluate with both backends: the same pairs, the same answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand
from networks import random_network, reference_checkpoint
from PIL import Image

from siamese_deploy.cli.eval import main as siamese_eval
from siamese_export.cli import main as export_main
from siamese_train.cli import train_eval_main, train_main


def scores(folder: Path) -> np.ndarray:
    with open(folder / "pairs.csv", newline="") as file:
        return np.array([float(row["score"]) for row in csv.DictReader(file)])


def evaluate_both(run: RunCommand, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    bundle, torch_out, onnx_out = tmp_path / "bundle", tmp_path / "torch", tmp_path / "onnx"
    for result in (
        run(export_main, "--checkpoint", checkpoint, "-o", bundle, "--val_path", pictures),
        run(train_eval_main, "-v", pictures, "-o", torch_out, "-c", checkpoint, "--device", "cpu"),
        run(siamese_eval, "-v", pictures, "-o", onnx_out, "-c", bundle, "--provider", "cpu"),
    ):
        assert result.exit_code == 0, result.output
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (onnx_out, torch_out))
    assert (ours["backend"], theirs["backend"]) == ("onnxruntime", "pytorch")
    for key in ("pairs", "same_pairs", "pair_digest", "accuracy", "images", "classes"):
        assert ours[key] == theirs[key]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert np.abs(scores(onnx_out) - scores(torch_out)).max() <= 1e-4
    assert len(list(onnx_out.glob("*.png"))) == ours["pairs"]
    for k in range(ours["pairs"]):  # the pictures themselves, below the line with the score
        onnx_picture, torch_picture = (np.asarray(Image.open(out / f"{k}.png")) for out in (onnx_out, torch_out))
        assert np.array_equal(onnx_picture[30:], torch_picture[30:])
        assert np.ptp(onnx_picture[30:210, 20:190]) > 100  # and not empty


def test_trained_network(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    options = ("-b", "resnet18", "--weights", "none", "--image_size", 32, "--batch_size", 4, "-e", 2, "-s", 1)
    folders = ("--train_path", pictures, "--val_path", pictures, "-o", tmp_path / "run")
    assert run(train_main, *folders, *options).exit_code == 0
    evaluate_both(run, tmp_path / "run" / "epoch_2.pth", pictures, tmp_path)


@pytest.mark.slow
def test_checkpoint_of_the_reference_scripts(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path / "best.pth", random_network("resnet18", 224), "resnet18")
    evaluate_both(run, path, pictures, tmp_path)
