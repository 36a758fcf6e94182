from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import RunCommand, assert_refused
from networks import SMALL, own_checkpoint, random_network
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from siamese_train.checkpoint import read_checkpoint
from siamese_train.cli import train_eval_main, train_main
from siamese_train.model import SiameseNetwork

QUICK = ("-b", "shufflenet_v2_x0_5", "--weights", "none", "--image_size", "32")


def arguments(pictures: Path, out: Path, *more: object) -> tuple[object, ...]:
    steps = () if "batch" in more else ("--batch_size", 4)
    return ("--train_path", pictures, "--val_path", pictures, "-o", out, *QUICK, *steps, *more)


def test_writes_checkpoints_and_the_references_scalars(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    result = run(train_main, *arguments(pictures, out, "-e", 4, "-s", 2, "-lr", "1e-3"))
    assert result.exit_code == 0, result.output
    assert "epoch 4/4" in result.stdout
    assert "images/s" in result.stdout
    assert sorted(file.name for file in out.iterdir()) == [
        "best.pth", "config.json", "epoch_2.pth", "epoch_4.pth", "last.pth", "metrics.jsonl", "summary",
    ]  # fmt: skip
    events = EventAccumulator(str(out / "summary")).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert sorted(scalars) == [
        "images_per_s", "learning_rate", "train_acc", "train_loss", "val_acc", "val_loss", "val_roc_auc",
    ]  # fmt: skip
    assert {len(values) for values in scalars.values()} == {4}
    assert [event.step for event in events.Scalars("val_loss")] == [0, 1, 2, 3]
    best = read_checkpoint(out / "best.pth")
    assert best.training["metrics"]["val_loss"] == pytest.approx(min(scalars["val_loss"]), rel=1e-6)
    assert best.training["config"]["learning_rate"] == 1e-3
    assert read_checkpoint(out / "epoch_4.pth").epoch == 4

    # the log's figures are those of an evaluation of the file
    evaluated = run(train_eval_main, "-v", pictures, "-o", tmp_path / "eval", "-c", out / "best.pth", "--device", "cpu")
    assert f"loss: {best.training['metrics']['val_loss']:.4f}" in evaluated.stdout


def test_every_layer_learns_and_the_same_seed_gives_the_same_weights(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    initial = SiameseNetwork("shufflenet_v2_x0_5", 32).state_dict()
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(train_main, *arguments(pictures, tmp_path / name, "-e", 1, "-s", 1, "--seed", seed)).exit_code == 0
        states.append(read_checkpoint(tmp_path / name / "epoch_1.pth").model_state)
    first, second, other = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["cls_head.1.weight"], other["cls_head.1.weight"])
    learned = [key for key in first if key.endswith(("weight", "bias"))]
    assert all(not torch.equal(first[key], initial[key]) for key in learned)
    # Adam's first steps are about the learning rate long: from the seed's own initial weights, not from others
    assert (first["cls_head.1.weight"] - initial["cls_head.1.weight"]).abs().max() < 4 * 2e-4


def test_tensorboard_shows_scores_the_most_wrong_pairs_and_the_settings(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert run(train_main, *arguments(pictures, out, "-e", 2, "--pairing", "batch")).exit_code == 0
    events = EventAccumulator(str(out / "summary"), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["histograms"]) == ["val_scores/different", "val_scores/same"]
    same, different = (events.Histograms(f"val_scores/{kind}")[0].histogram_value for kind in ("same", "different"))
    assert same.num + different.num == 16
    grids = events.Images("val_most_wrong_pairs")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(grids) == 1 + (log[1]["val_loss"] < log[0]["val_loss"])  # whenever best.pth is written
    grid = Image.open(io.BytesIO(grids[0].encoded_image_string))
    assert (grid.width % 408, grid.height % 246) == (0, 0)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert [row["learning_rate"] for row in log] == pytest.approx(
        [event.value for event in events.Scalars("learning_rate")]
    )


def test_a_frozen_backbone_is_left_as_it_was_and_the_head_learns(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    network = random_network("shufflenet_v2_x0_5", 32)
    initial = network.state_dict()
    torch.save({"model_state_dict": initial}, tmp_path / "initial.pth")
    (pictures / "cog/0.png").write_text("no picture")
    for pairing in ("reference", "batch"):
        out = tmp_path / pairing
        result = run(
            train_main,
            *arguments(
                pictures, out, "-e", 2, "--freeze_backbone", "--pairing", pairing, "--weights", tmp_path / "initial.pth"
            ),
        )
        assert result.exit_code == 0, result.output
        assert "skipped 1 files" in result.stderr
        state = read_checkpoint(out / "last.pth").model_state
        same = {key: torch.equal(value, state[key]) for key, value in initial.items()}
        assert all(same[key] for key in initial if key.startswith("backbone."))
        assert not any(same[key] for key in initial if key.startswith("cls_head.") and key.endswith("weight"))
        evaluated = run(train_eval_main, "-v", pictures, "-o", out / "eval", "-c", out / "best.pth", "--device", "cpu")
        assert f"loss: {read_checkpoint(out / 'best.pth').training['metrics']['val_loss']:.4f}" in evaluated.stdout


def test_early_stopping_and_its_resume(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = arguments(pictures, out, "-e", 50, "--early_stopping", 2, "-lr", "1e-2")
    stopped = run(train_main, *options)
    assert "stopped early: no lower validation loss for 2 epochs" in stopped.stdout
    losses = [json.loads(line)["val_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) < 50
    assert min(losses[-2:]) >= min(losses[:-2])
    assert losses.index(min(losses)) == len(losses) - 3
    again = run(train_main, *options, "--resume")
    assert (again.exit_code, "epoch" in again.stdout.replace("epochs", "")) == (0, False)
    # losses on other pictures count for nothing
    (pictures / "apple/0.png").unlink()
    again = run(train_main, *options, "--resume", "--resume_changed")
    assert (again.exit_code, f"epoch {len(losses) + 1}/50" in again.stdout) == (0, True), again.output


def test_an_embedding_of_another_width_trains_evaluates_and_takes_weights(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(train_main, *arguments(pictures, out, "-e", 1, "--embedding_dim", 48)).exit_code == 0
    checkpoint = read_checkpoint(out / "best.pth")
    assert checkpoint.model_state["cls_head.1.weight"].shape == (512, 48)
    assert checkpoint.build_model().embedding_dim == 48
    evaluated = run(train_eval_main, "-v", pictures, "-o", tmp_path / "e", "-c", out / "best.pth", "--device", "cpu")
    assert evaluated.exit_code == 0, evaluated.output
    # weights with torchvision's last layer fill all but the new one; those of another network are still refused
    full = SiameseNetwork("shufflenet_v2_x0_5", 32).backbone.state_dict()
    torch.save(full, tmp_path / "full.pth")
    options = ("-e", 1, "-lr", "1e-12", "--embedding_dim", 48, "--weights")
    result = run(train_main, *arguments(pictures, tmp_path / "b", *options, tmp_path / "full.pth"))
    assert result.exit_code == 0, result.output
    state = read_checkpoint(tmp_path / "b/best.pth").model_state
    assert torch.allclose(state["backbone.conv1.0.weight"], full["conv1.0.weight"], atol=1e-9)
    assert state["backbone.fc.weight"].shape == (48, 1024)
    torch.save(SiameseNetwork("shufflenet_v2_x1_0", 32).backbone.state_dict(), tmp_path / "other.pth")
    result = run(train_main, *arguments(pictures, tmp_path / "c", *options, tmp_path / "other.pth"))
    assert_refused(result, 4, "weights of another network")


def test_fewer_classes_than_asked_are_said_and_enough(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    result = run(train_main, *arguments(pictures, tmp_path / "out", "-e", 1, "--pairing", "batch"))
    assert result.exit_code == 0, result.output
    assert "batches have 4 classes, not 16: there are no more" in result.stdout
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert (settings["optimizer"], settings["schedule"], settings["identity_loss"]) == ("adamw", "cosine", 1.0)


@pytest.mark.slow
def test_a_loading_process_that_dies_is_said_and_costs_no_checkpoint(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = arguments(pictures, out, "-e", 100_000, "-s", 1, "--workers", 1)
    command = [Path(sys.executable).with_name("siamese-train"), *options]
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not (out / "epoch_2.pth").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 5, stderr
    assert "a loading process died" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    read_checkpoint(out / "epoch_2.pth")


def test_a_folder_with_checkpoints_or_a_file_is_refused(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "epoch_25.pth").write_bytes(b"precious")
    assert_refused(run(train_main, *arguments(pictures, out)), 2, "epoch_25.pth", "--resume")
    assert (out / "epoch_25.pth").read_bytes() == b"precious"
    assert_refused(run(train_main, *arguments(pictures, out / "epoch_25.pth")), 2, "is a file")
    assert_refused(run(train_main, *arguments(pictures, pictures / "run")), 2, "lies in the picture folder")


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (("-lr", "nan"), 2, "--learning_rate: expected 1e-12 to 10, got nan"),
        (("-lr", "-1"), 2, "--learning_rate"),
        (("-e", "0"), 2, "--epochs: expected 1 to"),
        (("-e", "2.5"), 2, "'2.5' is not a valid integer"),
        (("-b", "resnet19"), 2, "did you mean resnet1"),
        (("-b", "vit_b_16"), 2, "vit_b_16 takes pictures of exactly 224 px a side, got 32: use --image_size 224"),
        (("--weights", "absent.pth"), 3, "expected default, none or a file"),
        (("--pairing", "all"), 2, "'all' is not one of 'reference', 'batch'"),
        (("--fill", "300,0,0"), 2, "--fill: expected black, white, border or R,G,B"),
        (("--ema", "1"), 2, "--ema: expected 0 to 0.99999, got 1"),
        (("--device", "tpu"), 2, "expected auto, cpu, cuda or cuda:N"),
        (("--batch_size", "32"), 3, "16 pictures are fewer than one batch of 32"),
        (("--train_path", "absent"), 3, "no such folder"),
        (("--val_path", "absent"), 3, "no such folder"),
    ],
)
def test_wrong_options_and_folders(
    run: RunCommand, pictures: Path, tmp_path: Path, options: tuple[str, ...], exit_code: int, words: str
) -> None:
    assert_refused(run(train_main, *arguments(pictures, tmp_path / "out", *options)), exit_code, words)
    assert not (tmp_path / "out").exists()


def test_missing_options_and_options_without_effect(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    assert_refused(run(train_main, "--val_path", pictures, "-o", tmp_path / "out"), 2, "Missing option '--train_path'")
    for options, words in (
        (("--pairing", "batch", "--batch_size", 8), "--batch_size: has no effect with --pairing batch"),
        (("--images_per_class", 2), "--images_per_class: has no effect with --pairing reference"),
        (("--freeze_backbone", "--no_flip"), "--no_flip: has no effect with --freeze_backbone"),
        (("--freeze_backbone", "--identity_loss", 1), "--identity_loss: has no effect with --freeze_backbone"),
    ):
        assert_refused(run(train_main, *arguments(pictures, tmp_path / "out", *options)), 2, words)
    # a new last layer would be frozen as it was drawn
    torch.save(SiameseNetwork("shufflenet_v2_x0_5", 32).backbone.state_dict(), tmp_path / "full.pth")
    options = ("--freeze_backbone", "--embedding_dim", 48, "--weights", tmp_path / "full.pth")
    result = run(train_main, *arguments(pictures, tmp_path / "out", *options))
    assert_refused(result, 2, "--freeze_backbone: --weights gives no learned weights to all layers")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_exit_5(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    result = run(train_main, *arguments(pictures, tmp_path / "out", "--device", "cuda"))
    assert_refused(result, 5, "sees 0 CUDA devices")


def test_one_class_is_refused(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (pictures / "apple").rename(tmp_path / "one" / "apple")
    for option in ("--train_path", "--val_path"):
        result = run(train_main, *arguments(pictures, tmp_path / "out", option, tmp_path / "one"))
        assert_refused(result, 3, "one class only")


def test_unreadable_pictures_do_not_stop_a_run_and_are_listed(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    (pictures / "cog/0.png").write_text("no picture")
    (pictures / "empty").mkdir()
    val = tmp_path / "val"
    shutil.copytree(pictures, val)
    (val / "door/1.png").write_text("no picture either")
    options = ("-e", 1, "-s", 1, "--val_path", val, "--log", tmp_path / "log")
    result = run(train_main, *arguments(pictures, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    assert "skipped 5 files" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    skipped = {line["path"]: line["code"] for line in lines if line["event"] == "skipped"}
    assert len(skipped) == 5
    assert skipped[str(val / "door/1.png")] == "not-a-picture"
    assert (lines[-1]["event"], lines[-1]["epochs"]) == ("finished", 1)
    with open(tmp_path / "out/skipped_pictures.csv", newline="") as file:
        listed = {row["path"] for row in csv.DictReader(file)}
    expected = {pictures / "empty", pictures / "cog/0.png", val / "empty", val / "cog/0.png", val / "door/1.png"}
    assert listed == {str(path) for path in expected}
    data = read_checkpoint(tmp_path / "out/epoch_1.pth").training["validation"]
    evaluated = run(train_eval_main, "-v", val, "-o", tmp_path / "eval", "-c", tmp_path / "out/epoch_1.pth")
    assert data["val_pair_digest"] in evaluated.stdout
    for file in pictures.rglob("*.png"):
        file.write_text("no picture")
    assert_refused(run(train_main, *arguments(pictures, tmp_path / "b", "-e", 1)), 3, "no training pair can be read")


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    weights = random_network()
    with torch.no_grad():
        weights.cls_head[1].weight[:] = 1e38
    own_checkpoint(tmp_path / "huge.pth", weights, *SMALL)
    options = ("-b", SMALL[0], "--image_size", SMALL[1], "--weights", tmp_path / "huge.pth", "-e", 1)
    result = run(train_main, *arguments(pictures, tmp_path / "out", *options))
    assert_refused(result, 4, "NaN or infinity in epoch 1", "smaller --learning_rate")
    assert not list((tmp_path / "out").glob("*.pth"))


def test_evaluating_what_is_no_checkpoint(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("-v", pictures, "-o", tmp_path / "out", "-c")
    assert_refused(run(train_eval_main, *arguments, tiny_bundle), 4, "siamese-eval")
    assert_refused(run(train_eval_main, *arguments, tmp_path / "absent.pth"), 3, "no such checkpoint")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    assert_refused(run(train_eval_main, *arguments, tmp_path / "cut.pth"), 4, "damaged")


def test_missing_torch_names_the_command_to_install_it(pictures: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from siamese_train.cli import {0}; {0}()"
    train = [str(part) for part in arguments(pictures, tmp_path / "out")]
    evaluate = ["-v", str(pictures), "-o", str(tmp_path / "out"), "-c", "best.pth"]
    for main, options in (("train_main", train), ("train_eval_main", evaluate)):
        command = [sys.executable, "-c", code.format(main), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 5
        assert done.stderr.strip().endswith("torch is not installed; run: pip install 'siamese-toolkit[train]'")
        assert len(done.stderr.splitlines()) == 1
        assert subprocess.run([*command[:3], "--help"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training_keeps_its_checkpoints(
    pictures: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    out = tmp_path / "out"
    command = [
        Path(sys.executable).with_name("siamese-train"),
        *arguments(pictures, out, "-e", 100_000, "-s", 1, "--workers", 1),
    ]
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 100
    while not (out / "epoch_2.pth").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == exit_code, stderr
    assert "Traceback" not in stderr
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    for file in out.glob("*.pth"):
        read_checkpoint(file)
