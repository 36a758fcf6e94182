"""What a run meets while it trains: pictures that go away, little room, no shared memory, options that are none."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCommand, assert_refused
from torch.utils.data import Dataset

from siamese_deploy.errors import EnvironmentFault
from siamese_deploy.image_folder import scan_image_folder
from siamese_train.checkpoint import read_checkpoint
from siamese_train.cli import train_main
from siamese_train.config import TrainConfig
from siamese_train.data import batches_of, epoch_sampler, training_batches
from siamese_train.processes import Processes
from siamese_train.train import train

TRAIN = (sys.executable, "-c", "from siamese_train.cli import train_main; train_main()")
QUICK = ("-b", "shufflenet_v2_x0_5", "--weights", "none", "--image_size", 32, "--batch_size", 4)


def arguments(pictures: Path, out: Path, *more: object) -> list[str]:
    return [str(part) for part in ("--train_path", pictures, "--val_path", pictures, "-o", out, *QUICK, "-e", 1, *more)]


# --- pictures ------------------------------------------------------------------------------------------------------


def config_for(pictures: Path, val: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        pictures, val, out, backbone="shufflenet_v2_x0_5", weights="none", image_size=32, batch_size=4, epochs=3,
        cache_mib=0, learning_rate=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("gone", ["train", "val"])
def test_the_whole_disk_goes_away_and_comes_back(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    val = tmp_path / "val"
    subprocess.run(["cp", "-r", pictures, val], check=True)
    config = config_for(pictures, val, tmp_path / "out")
    train(replace(config, out_path=tmp_path / "straight"))
    root, steps, zero_grad = {"train": pictures, "val": val}[gone], 0, torch.optim.Optimizer.zero_grad

    def unplugging(self: torch.optim.Optimizer, *given: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:  # in the second of three epochs of four steps
            root.rename(tmp_path / "unplugged")
            root.mkdir()
        return zero_grad(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", unplugging)
        with pytest.raises(EnvironmentFault, match=r"its folders are gone.* --resume goes on"):
            train(config)
    assert read_checkpoint(tmp_path / "out/last.pth").training["progress"]["step"] == {"train": 6 - 4, "val": 4}[gone]
    root.rmdir()
    (tmp_path / "unplugged").rename(root)
    train(replace(config, resume=True))
    first, second = (read_checkpoint(tmp_path / name / "last.pth").model_state for name in ("straight", "out"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_one_picture_that_goes_away_is_skipped(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    script = (
        "import sys, os, torch\n"
        "zero_grad = torch.optim.Optimizer.zero_grad\n"
        "def removing(self, *given, **more):\n"
        "    if os.path.exists(sys.argv[2] + '/apple/0.png'): os.unlink(sys.argv[2] + '/apple/0.png')\n"
        "    return zero_grad(self, *given, **more)\n"
        "torch.optim.Optimizer.zero_grad = removing\n"
        "from siamese_train.cli import train_main; train_main()"
    )
    command = [sys.executable, "-c", script, *arguments(pictures, tmp_path / "out", "-e", 2, "--cache_mib", 0)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    assert "skipped 1 files" in done.stderr
    assert "apple/0.png,cannot be opened" in (tmp_path / "out/skipped_pictures.csv").read_text()


def test_the_same_pictures_for_training_and_validation_are_told(
    run: RunCommand, pictures: Path, tmp_path: Path
) -> None:
    words = "training and validation pictures are the same"
    (tmp_path / "link").symlink_to(pictures)
    for k, val in enumerate((pictures, tmp_path / "link")):
        result = run(train_main, *arguments(pictures, tmp_path / f"out{k}", "--val_path", val))
        assert (result.exit_code, words in result.output) == (0, True), result.output
    subprocess.run(["cp", "-r", pictures, tmp_path / "val"], check=True)
    (tmp_path / "val/apple/0.png").unlink()
    assert words not in run(train_main, *arguments(pictures, tmp_path / "out2", "--val_path", tmp_path / "val")).output


def test_nothing_is_written_into_the_pictures(pictures: Path, tmp_path: Path) -> None:
    inside = [pictures, *pictures.rglob("*")]
    for path in inside:
        path.chmod(0o500 if path.is_dir() else 0o400)

    def without_roots_powers() -> None:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    try:
        command = [*TRAIN, *arguments(pictures, tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=without_roots_powers)
        assert done.returncode == 0, done.stderr
    finally:
        for path in inside:
            path.chmod(0o700)
    assert sorted([pictures, *pictures.rglob("*")]) == sorted(inside)


# --- loading processes ---------------------------------------------------------------------------------------------


class Failing(Dataset[Any]):
    def __getitem__(self, key: object) -> Any:
        raise MemoryError("no room for this picture")


def test_an_error_of_a_loading_process_ends_them_all(pictures: Path, tmp_path: Path) -> None:
    """They ignore SIGTERM: one that stays is waited for without end when the training process ends."""
    config = replace(config_for(pictures, pictures, tmp_path), workers=2)
    sampler = epoch_sampler(scan_image_folder(pictures), config, Processes(torch.device("cpu")))
    loader = training_batches(Failing(), sampler, config, torch.device("cpu"))
    before = set(multiprocessing.active_children())
    with pytest.raises(MemoryError):
        next(batches_of(loader))
    assert set(multiprocessing.active_children()) <= before


def with_little_shared_memory() -> None:
    libc = ctypes.CDLL(None)
    new_namespace, private = 0x20000, 0x4000 | 0x40000
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None):
        os._exit(77)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=60k"):
        os._exit(77)


@pytest.mark.slow
def test_full_shared_memory_is_an_error_and_no_endless_wait(pictures: Path, tmp_path: Path) -> None:
    """64 MiB are a container's default, which a few batches fill."""
    command = [*TRAIN, *arguments(pictures, tmp_path / "out", "--batch_size", 8, "--workers", 2)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=with_little_shared_memory, timeout=300
        )
    except subprocess.TimeoutExpired:
        pytest.fail("training waits for ever for a batch that its loading process could not send")
    if done.returncode == 77:
        pytest.skip("only root may mount a small /dev/shm")
    assert done.returncode == 5, done.stderr
    assert "no shared memory left; enlarge /dev/shm" in done.stderr
    assert "Traceback" not in done.stderr


# --- places --------------------------------------------------------------------------------------------------------


def test_without_a_tensorboard_summary_training_goes_on(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary").write_text("in the way")
    result = run(train_main, *arguments(pictures, out, "-e", 2))
    assert result.exit_code == 0, result.output
    assert "no TensorBoard summary: " in result.stderr
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert read_checkpoint(out / "last.pth").epoch == 2


def test_damaged_event_files_do_not_stop_a_resume(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(train_main, *arguments(pictures, out)).exit_code == 0
    (events,) = (out / "summary").iterdir()
    events.write_bytes(events.read_bytes()[:37] + b"damage")
    result = run(train_main, *arguments(pictures, out, "-e", 2, "--resume", "--resume_changed"))
    assert result.exit_code == 0, result.output
    assert len(list((out / "summary").iterdir())) == 2  # each run has a file of its own
    assert events.read_bytes().endswith(b"damage")


def test_too_little_room_is_told_before_training(
    run: RunCommand, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = os.statvfs(tmp_path).f_bavail
    assert "MiB free" not in run(train_main, *arguments(pictures, tmp_path / "a")).stderr or room < 2**16
    used = type("usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: used)
    result = run(train_main, *arguments(pictures, tmp_path / "b"))
    assert result.exit_code == 0, result.output
    warning = next(line for line in result.stderr.splitlines() if "MiB free" in line)
    assert warning.startswith(f"warning: {tmp_path}/b: 1 MiB free, and best.pth, last.pth and a temporary file take ")


def test_what_a_killed_run_left_half_written_is_removed(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".best.pth.abcdefgh.tmp", ".metrics.jsonl.abcdefgh.tmp"):
        (out / name).write_bytes(b"half")
    (out / ".mine.tmp").write_bytes(b"mine")
    assert run(train_main, *arguments(pictures, out, "--resume")).exit_code == 0
    assert [path.name for path in out.glob(".*")] == [".mine.tmp"]


def test_places_that_take_no_checkpoints(
    run: RunCommand, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    for out, exit_code, words in (
        (tmp_path / "home", 2, "where no results belong"),  # before the root: see test_faults_of_the_command_line.py
        (Path("/"), 2, "where no results belong"),
        (tmp_path / "file", 2, "is a file"),
        (Path("/proc/nowhere"), 5, "no folder can be made there"),
        (pictures, 2, "lies in the picture folder"),
    ):
        assert_refused(run(train_main, *arguments(pictures, out)), exit_code, words)
    assert os.listdir(tmp_path / "home") == []


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-lr", "nan"), ("-lr", "inf"), ("-lr", "1e999"), ("-lr", "0"), ("-lr", "-1e-3"), ("-lr", "1,5"), ("-lr", ""),
        ("-e", "0"), ("-e", "-1"), ("-e", "2.5"), ("-e", "1000000000"), ("--batch_size", "0"), ("--workers", "-1"),
        ("--image_size", "0"), ("--image_size", "100000"), ("--seed", str(2**64)), ("--seed", "-1"), ("--ema", "nan"),
        ("--warmup_epochs", "inf"), ("--clip_norm", "nan"), ("--save_minutes", "-1"), ("--cache_mib", "-1"),
        ("-b", ""), ("-b", "resnet"), ("-b", "fasterrcnn_resnet50_fpn"), ("-b", "r3d_18"), ("-b", "quantized_resnet18"),
    ],
)  # fmt: skip
def test_options_that_are_none_end_before_anything_is_touched(
    run: RunCommand, pictures: Path, tmp_path: Path, option: str, value: str
) -> None:
    name = {"-lr": "--learning_rate", "-e": "--epochs", "-b": "--backbone"}.get(option, option)
    result = run(train_main, *arguments(pictures, tmp_path / "out", option, value))
    assert_refused(result, 2, name)
    assert not (tmp_path / "out").exists()


def test_digits_of_another_script_are_digits_and_kept_as_such(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    result = run(train_main, *arguments(pictures, tmp_path / "out", "-s", "\N{FULLWIDTH DIGIT ONE}2"))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out/config.json").read_text())["save_after"] == 12


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has so many")
def test_a_device_that_is_not_here(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    result = run(train_main, *arguments(pictures, tmp_path / "out", "--device", "cuda:7"))
    assert_refused(result, 5, "--device cuda:7", "CUDA devices")
    assert not (tmp_path / "out").exists()
