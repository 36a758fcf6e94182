"""A run that was stopped at any moment and resumed ends as the undisturbed one, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCommand, assert_refused
from networks import SMALL, own_checkpoint, random_network, reference_checkpoint

from siamese_deploy.durable_files import locked_folder
from siamese_deploy.errors import CheckpointError
from siamese_train.checkpoint import read_checkpoint
from siamese_train.cli import train_main
from siamese_train.config import TrainConfig
from siamese_train.train import train

STEPS_PER_EPOCH = 3  # 16 pictures, 5 pairs a batch
EPOCHS = 3
EVERYTHING: dict[str, Any] = {
    "pairing": "batch", "classes_per_batch": 2, "images_per_class": 3, "hard_negatives": 1.0, "identity_loss": 1.0,
    "optimizer": "adamw", "weight_decay": 0.01, "schedule": "cosine", "warmup_epochs": 1.0, "clip_norm": 1.0,
    "ema": 0.9, "amp": "bf16", "channels_last": True, "embedding_dim": 64, "fill": "border",
}  # fmt: skip
"""All that adds state to a run; 16 pictures in steps of 6 make 2 steps an epoch."""


def config_for(pictures: Path, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        pictures, pictures, out, backbone="shufflenet_v2_x0_5", weights="none", learning_rate=1e-3, epochs=EPOCHS,
        image_size=32, batch_size=5, **changes,
    )  # fmt: skip


def outcome(out: Path) -> tuple[dict[str, Any], list[Any], str]:
    """Weights, optimiser and log at the end of a run."""
    last = read_checkpoint(out / "last.pth")
    assert last.epoch == EPOCHS
    return last.model_state, list(last.optimizer_state["state"].values()), (out / "metrics.jsonl").read_text()


def assert_equal(first: Path, second: Path) -> None:
    weights, optimiser, log = outcome(first)
    other_weights, other_optimiser, other_log = outcome(second)
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())
    assert optimiser[0]["step"] > 0  # so that there was something to keep
    for moments, other_moments in zip(optimiser, other_optimiser, strict=True):
        assert all(torch.equal(value, other_moments[key]) for key, value in moments.items())
    assert log == other_log
    best, other_best = read_checkpoint(first / "best.pth"), read_checkpoint(second / "best.pth")
    assert best.training["metrics"] == other_best.training["metrics"]
    assert all(torch.equal(value, other_best.model_state[key]) for key, value in best.model_state.items())


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives in the middle of this step of the process (from 1)."""
    zero_grad = torch.optim.Optimizer.zero_grad
    taken = 0

    def counting(self: torch.optim.Optimizer, *arguments: Any, **more: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            signal.raise_signal(signal.SIGINT)
        return zero_grad(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", counting)


def check_interrupted_at(step: int, workers: int, pictures: Path, straight: Path, out: Path, **recipe: Any) -> None:
    config = config_for(pictures, out, workers=workers, **recipe)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    saved = read_checkpoint(out / "last.pth").training["progress"]
    n_steps = STEPS_PER_EPOCH if not recipe else 2
    assert saved["epoch"] * n_steps + saved["step"] == step
    torch.manual_seed(987)  # whatever the process did in between
    train(replace(config, resume=True))
    assert_equal(out, straight)


@pytest.mark.parametrize(("step", "workers", "recipe"), [(5, 2, {}), (4, 0, EVERYTHING)])
def test_resumed_run_is_bit_equal(
    pictures: Path, tmp_path: Path, step: int, workers: int, recipe: dict[str, Any]
) -> None:
    train(config_for(pictures, tmp_path / "straight", **recipe))
    check_interrupted_at(step, workers, pictures, tmp_path / "straight", tmp_path / "resumed", **recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, EVERYTHING], ids=["reference", "everything"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_bit_equal_at_every_step(
    pictures: Path, tmp_path: Path, workers: int, recipe: dict[str, Any]
) -> None:
    train(config_for(pictures, tmp_path / "straight", **recipe))
    for step in range(1, EPOCHS * (2 if recipe else STEPS_PER_EPOCH) + 1):
        out = tmp_path / f"resumed{step}"
        check_interrupted_at(step, workers, pictures, tmp_path / "straight", out, **recipe)


@pytest.mark.slow
def test_killed_at_random_times(pictures: Path, tmp_path: Path) -> None:
    """SIAMESE_KILLS=100 for the long version."""
    train(config_for(pictures, tmp_path / "straight"))
    out = tmp_path / "killed"
    options = ["--train_path", pictures, "--val_path", pictures, "-o", out, "-b", "shufflenet_v2_x0_5"]
    options += ["--weights", "none", "-lr", "1e-3", "-e", EPOCHS, "--image_size", 32, "--batch_size", 5]
    options += ["--resume", "--save_minutes", 0]
    command = [str(part) for part in [Path(sys.executable).with_name("siamese-train"), *options]]
    kills = int(os.environ.get("SIAMESE_KILLS", "5"))
    chance = random.Random(1)  # noqa: S311
    started = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole_s = time.monotonic() - started
    shutil.rmtree(out)
    killed = 0
    while killed < kills:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(chance.uniform(0.4, 1.0) * whole_s)
        killed += child.poll() is None
        child.kill()
        _, stderr = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), stderr
        if child.returncode == 0 and killed < kills:
            assert_equal(out, tmp_path / "straight")
            shutil.rmtree(out)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_equal(out, tmp_path / "straight")
    assert not list(out.glob(".*.tmp"))


def test_resuming_a_finished_run_changes_nothing_and_an_empty_folder_starts(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    options = ["--train_path", pictures, "--val_path", pictures, "-o", tmp_path / "out", "--weights", "none"]
    options += ["-b", "shufflenet_v2_x0_5", "--image_size", 32, "-e", 1, "--resume"]
    first = run(train_main, *options)
    assert (first.exit_code, "starting a new run" in first.stderr) == (0, True)
    before = read_checkpoint(tmp_path / "out/last.pth").model_state
    second = run(train_main, *options)
    assert (second.exit_code, "epoch 1/1" in second.stdout) == (0, False)
    after = read_checkpoint(tmp_path / "out/last.pth").model_state
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    changed = run(train_main, *options, "-e", 2, "-lr", "1e-3")
    assert_refused(changed, 2, "--learning_rate was 0.0001, is 0.001", "--epochs was 1, is 2", "--resume_changed")
    best = (tmp_path / "out/best.pth").read_bytes()
    assert run(train_main, *options, "-lr", "1e-3", "--resume_changed").exit_code == 0  # nothing left to train
    assert (tmp_path / "out/best.pth").read_bytes() == best  # and not written anew under settings it was not made with
    assert run(train_main, *options, "--resume_changed").exit_code == 0
    (pictures / "door/3.png").unlink()
    assert_refused(run(train_main, *options), 3, "train_images was 16, is 15", "--resume_changed")
    allowed = run(train_main, *options, "-e", 2, "-lr", "1e-3", "--resume_changed")
    assert allowed.exit_code == 0, allowed.output
    assert "epoch 2/2" in allowed.stdout
    log = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2]
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert (settings["epochs"], settings["learning_rate"]) == (2, 1e-3)
    assert read_checkpoint(tmp_path / "out/last.pth").optimizer_state["param_groups"][0]["lr"] == 1e-3


def test_a_run_of_the_first_version_goes_on(pictures: Path, tmp_path: Path) -> None:
    """Its checkpoints knew fewer settings, counted right pairs in whole numbers, and kept the generator's state."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    train(config_for(pictures, straight))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config_for(pictures, out))
    (out / "best.pth").unlink()
    content = torch.load(out / "last.pth", weights_only=True)
    own = content["siamese_toolkit"]
    known = ("backbone", "weights", "learning_rate", "epochs", "image_size", "batch_size", "seed")
    own["config"] = {name: own["config"][name] for name in known}
    own["progress"]["correct"] = int(own["progress"]["correct"])
    del own["progress"]["stale_epochs"], own["learner"]
    own["random"] = torch.get_rng_state()
    torch.save(content, out / "last.pth")
    train(config_for(pictures, out, resume=True))
    expected = outcome(straight)[0]
    assert all(torch.equal(value, expected[key]) for key, value in outcome(out)[0].items())


@pytest.mark.slow
def test_other_memory_and_other_optimisers_after_a_resume(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config_for(pictures, tmp_path / "a"), epochs=1)
    train(config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again: dict[str, Any] = {"epochs": 2, "resume": True, "resume_changed": True}
    train(replace(config, **again))
    train(replace(config, **again, out_path=tmp_path / "b", channels_last=True))
    one, other = (read_checkpoint(tmp_path / name / "last.pth").model_state for name in "ab")
    assert max(float((value - other[key]).abs().max()) for key, value in one.items() if "running" not in key) < 0.01
    capsys.readouterr()
    train(replace(config, **(again | {"epochs": 3}), weight_decay=0.1))
    assert "the optimiser starts anew" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "a/last.pth").epoch == 3


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    train(config_for(pictures, straight, save_after=1))
    out.mkdir()
    for name in ("best.pth", "epoch_1.pth"):
        shutil.copy(straight / name, out)
        time.sleep(0.01)
    (out / "last.pth").write_bytes((straight / "last.pth").read_bytes()[:-1000])
    train(config_for(pictures, out, resume=True))
    stderr = capsys.readouterr().err
    assert "passed over: " in stderr
    assert "last.pth" in stderr
    assert_equal(out, straight)


def test_folders_without_a_run_to_resume(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    options = ["--train_path", pictures, "--val_path", pictures, "-o", tmp_path / "out", "--weights", "none"]
    options += ["-b", SMALL[0], "--image_size", SMALL[1], "-e", 1, "--resume"]
    (tmp_path / "out").mkdir()
    reference_checkpoint(tmp_path / "out/best.pth", random_network(), SMALL[0])
    assert_refused(run(train_main, *options), 4, "holds weights and no run to resume")
    (tmp_path / "out/best.pth").write_bytes(b"junk")
    result = run(train_main, *options)
    assert result.exit_code == 4
    assert "none of 1 checkpoints can be read" in result.stderr
    (tmp_path / "out/best.pth").unlink()
    with locked_folder(tmp_path / "out"):
        assert_refused(run(train_main, *options), 6, "another run writes into this folder")


def test_a_full_disk_costs_one_save_and_not_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from siamese_train import train as module

    save, calls = module.save_checkpoint, []

    def full_at_first(path: Path, **content: Any) -> None:
        calls.append(path.name)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, **content)

    monkeypatch.setattr(module, "save_checkpoint", full_at_first)
    train(config_for(pictures, tmp_path / "out", save_after=1))
    assert calls[:2] == ["best.pth", "epoch_1.pth"]
    assert "No space left on device; training goes on" in capsys.readouterr().err
    # the lost best.pth was tried again, whether or not a later epoch was better than the first
    assert calls[2] == "best.pth"
    assert read_checkpoint(tmp_path / "out/best.pth").epoch >= 2


def test_a_disk_that_fills_while_writing_costs_no_earlier_file(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(replace(config_for(pictures, out), epochs=1))
    before = {file.name: file.read_bytes() for file in out.glob("*.pth")}
    options = ["--train_path", pictures, "--val_path", pictures, "-o", out, "-b", "shufflenet_v2_x0_5"]
    options += ["--weights", "none", "-lr", "1e-3", "-e", 3, "-s", 1, "--image_size", 32, "--batch_size", 5]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a checkpoint has 17 MB
    try:
        result = run(train_main, *options, "--resume", "--resume_changed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 5, result.stderr  # the last save of all is not optional
    assert "training goes on" in result.stderr
    assert "epoch 3/3" in result.stdout
    assert "-> " not in result.stdout  # nothing claims to be saved
    assert {file.name: file.read_bytes() for file in out.glob("*.pth")} == before
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("die_at", ["best.pth", "epoch_3.pth", "metrics.jsonl", "last.pth"])
def test_killed_while_the_last_epoch_is_recorded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: str
) -> None:
    """Whatever was or was not written yet is there after a resume."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    train(config_for(pictures, straight, save_after=3))
    real = os.replace

    class Killed(BaseException):
        pass

    def dying(source: Any, target: Any) -> None:
        text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
        due = die_at != "best.pth" or len(text.splitlines()) == 1
        if Path(target).name == die_at and due and (die_at != "metrics.jsonl" or len(text.splitlines()) == 2):
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            train(config_for(pictures, out, save_after=3))
    train(config_for(pictures, out, save_after=3, resume=True))
    assert_equal(out, straight)
    assert read_checkpoint(out / "epoch_3.pth").epoch == 3


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved_nor_resumed(
    run: RunCommand, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = random_network()
    with torch.no_grad():
        network.cls_head[5].bias[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"cls_head\.5\.bias holds NaN"):
        own_checkpoint(tmp_path / "best.pth", network, *SMALL)
    assert os.listdir(tmp_path) == ["pictures"]

    straight, out = tmp_path / "straight", tmp_path / "out"
    train(config_for(pictures, straight))
    shutil.copytree(straight, out)
    content = torch.load(out / "last.pth", weights_only=True)
    content["model_state_dict"]["cls_head.5.bias"][0] = float("nan")
    torch.save(content, out / "last.pth")
    train(config_for(pictures, out, resume=True))
    assert "passed over: " in capsys.readouterr().err
    assert_equal(out, straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_process_group_save_and_end_cleanly(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal, systemd and batch schedulers send them: to the loading processes too."""
    out = tmp_path / "out"
    command = [Path(sys.executable).with_name("siamese-train"), "--train_path", pictures, "--val_path", pictures]
    command += ["-o", out, "-b", "shufflenet_v2_x0_5", "--weights", "none", "--image_size", 32, "--batch_size", 4]
    command += ["--workers", 2, "-e", 100_000, "-s", 100_000]
    child = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not (out / "best.pth").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(child.pid, number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 128 + number, stderr
    assert b"Traceback" not in stderr
    assert read_checkpoint(out / "last.pth").training["progress"]["epoch"] >= 1


def test_last_is_written_as_often_as_asked(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from siamese_train import train as module

    saved = []
    monkeypatch.setattr(module, "save_checkpoint", lambda path, **content: saved.append(path.name))
    train(config_for(pictures, tmp_path / "a", save_minutes=0))
    assert saved.count("last.pth") == EPOCHS * STEPS_PER_EPOCH + 1
    saved.clear()
    train(config_for(pictures, tmp_path / "b"))
    assert saved.count("last.pth") == 1
