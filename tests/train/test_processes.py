"""Several processes started by torchrun train as one would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from siamese_train.checkpoint import Checkpoint, read_checkpoint

# No network with dropout: its masks would be others. BatchNorm cannot agree between CPU processes, so it is frozen.
OPTIONS = ("-b", "shufflenet_v2_x0_5", "--weights", "none", "--image_size", "32", "--freeze_batchnorm")
REFERENCE = ("--batch_size", "5")  # 16 pictures: 3 steps of 5 pairs, which two processes share as 3 and 2
BATCH = ("--pairing", "batch", "--classes_per_batch", "3", "--images_per_class", "3", "--warmup_epochs", "0")


def command(processes: int, pictures: Path, out: Path, *options: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [*torchrun, "-m", "siamese_train"] if processes > 1 else [sys.executable, "-m", "siamese_train"]
    folders = ["--train_path", str(pictures), "--val_path", str(pictures), "-o", str(out)]
    return [*start, *folders, *OPTIONS, *options]


def trained(processes: int, pictures: Path, out: Path, *options: str) -> tuple[Checkpoint, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(processes, pictures, out, *options), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return read_checkpoint(out / "last.pth"), done.stdout


def first_moments(checkpoint: Checkpoint) -> torch.Tensor:
    """Of a run of one step: 0.1 times the gradient of every weight."""
    return torch.cat([state["exp_avg"].flatten() for state in checkpoint.optimizer_state["state"].values()])


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", [REFERENCE, BATCH], ids=["reference", "batch"])
def test_the_gradient_of_a_global_batch_is_that_of_one_process(
    pictures: Path, tmp_path: Path, recipe: tuple[str, ...]
) -> None:
    for file in sorted(pictures.rglob("*.png"))[9:]:  # one step in an epoch
        file.unlink()
    alone, _ = trained(1, pictures, tmp_path / "alone", *recipe, "-e", "1")
    together, stdout = trained(2, pictures, tmp_path / "together", *recipe, "-e", "1")
    assert "2 cpu processes" in stdout
    assert stdout.count("epoch 1/1") == 1  # one process speaks
    gradient, other = (10 * first_moments(checkpoint) for checkpoint in (alone, together))
    assert gradient.abs().max() > 1e-3
    assert (gradient - other).abs().max() <= 1e-5


def test_an_interrupted_run_of_two_processes_resumes_in_the_same_weights(pictures: Path, tmp_path: Path) -> None:
    recipe = (*BATCH, "--epochs", "12", "--workers", "1", "--device", "cpu")
    straight, _ = trained(2, pictures, tmp_path / "straight", *recipe)
    out = tmp_path / "out"
    child = subprocess.Popen(
        command(2, pictures, out, *recipe),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while not (out / "best.pth").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)  # as Ctrl-C does: torchrun and its processes, to which torchrun passes it on
    _, stderr = child.communicate(timeout=60)
    assert child.returncode != 0
    saved = read_checkpoint(out / "last.pth").training["progress"]
    assert saved["epoch"] < 12, stderr
    resumed, _ = trained(2, pictures, out, *recipe, "--resume")
    assert all(torch.equal(value, straight.model_state[key]) for key, value in resumed.model_state.items())
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "straight/metrics.jsonl").read_text()


def test_too_many_processes_are_refused(pictures: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(2, pictures, tmp_path / "out", "--batch_size", "3"), capture_output=True, text=True, timeout=100
    )
    assert "is too small for 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unreadable_pictures_of_every_process_are_listed(pictures: Path, tmp_path: Path) -> None:
    names = [str(file) for file in (pictures / "apple/1.png", pictures / "cog/2.png", pictures / "door/0.png")]
    for name in names:
        Path(name).write_text("no picture")
    trained(2, pictures, tmp_path / "out", *BATCH, "--images_per_class", "4", "-e", "2")
    listing = (tmp_path / "out/skipped_pictures.csv").read_text()
    assert all(name in listing for name in names)
