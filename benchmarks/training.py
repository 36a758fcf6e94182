"""What training costs and what it reaches, on Omniglot's standard split; benchmarks/README.md has the last tables.

    python benchmarks/training.py compare     both pairings from the same initial weights
    python benchmarks/training.py pipeline    steps on loaded pictures against the same steps on preloaded tensors
    python benchmarks/training.py throughput  mixed precision and channels-last against float32
    python benchmarks/training.py recipes     what each part of the batch recipe is worth
    python benchmarks/training.py best        the best recipe found

Two cores; no GPU is used. The data are found at $SIAMESE_DATA or ../shared/data.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from siamese_deploy.evaluate import evaluate_pairs
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pairs import every_pair
from siamese_deploy.preprocess import Preprocess
from siamese_train.augment import Augmentation
from siamese_train.checkpoint import read_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.data import AugmentedPictures, Batch, epoch_sampler, training_batches
from siamese_train.learner import Learner
from siamese_train.model import SiameseNetwork
from siamese_train.picture_cache import PictureCache
from siamese_train.processes import Processes
from siamese_train.torch_verifier import TorchVerifier
from siamese_train.train import train

CPU = torch.device("cpu")
# Mirror images of characters are other characters, so neither pairing mirrors here.
COMMON: dict[str, Any] = {
    "backbone": "resnet18",
    "weights": "none",
    "no_flip": True,
    "save_minutes": 60,
    "device": "cpu",
}


def omniglot() -> Path:
    """The standard split, unpacked: train/<class> and val/<class>."""
    data = Path(os.environ.get("SIAMESE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (data / "unpack_omniglot.py").exists():
        sys.exit(f"{data}: no Omniglot here; set SIAMESE_DATA")
    out = Path(tempfile.gettempdir()) / "siamese-omniglot"
    if not out.exists():
        subprocess.run([sys.executable, data / "unpack_omniglot.py", out], check=True, stdout=subprocess.DEVNULL)
    return out


def all_pairs_auc(checkpoint: Path, root: Path) -> float:
    """ROC AUC of the scores of every unordered pair of pictures."""
    folder = scan_image_folder(root)
    verifier = TorchVerifier.from_checkpoint(read_checkpoint(checkpoint), CPU)
    auc = evaluate_pairs(verifier, folder, every_pair(folder)).metrics.roc_auc
    assert auc is not None
    return auc


def run(name: str, **settings: Any) -> list[dict[str, Any]]:
    """Train, then the passes, seconds and AUC of every epoch's checkpoint; printed as they come."""
    data = omniglot()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = COMMON | {"save_after": 1} | settings
        config = TrainConfig.with_recipe(train_path=data / "train", val_path=data / "val", out_path=out, **settings)
        images = epoch_sampler(scan_image_folder(config.train_path), config, Processes(CPU)).images_per_epoch
        started = time.time()
        train(config)
        for epoch in range(config.save_after, config.epochs + 1, config.save_after):
            file = out / f"epoch_{epoch}.pth"
            row = {
                "run": name,
                "epoch": epoch,
                "passes": epoch * images,
                "seconds": round(file.stat().st_mtime - started),
                "roc_auc": round(all_pairs_auc(file, config.val_path), 4),
            }
            print(
                "{run:12} epoch {epoch:3}  {passes:7} passes  {seconds:5} s  ROC AUC {roc_auc:.4f}".format(**row),
                flush=True,
            )
            rows.append(row)
    return rows


@click.group()
def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}", flush=True)


@main.command()
@click.option("--image_size", default=48)
def compare(image_size: int) -> None:
    """Reference pairing for 10 epochs, batch pairing for a fifth of its passes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        initial = Path(folder) / "initial.pth"
        torch.save({"model_state_dict": SiameseNetwork("resnet18", image_size).state_dict()}, initial)
        same: dict[str, Any] = {"image_size": image_size, "weights": str(initial)}
        reference = run("reference", **same, epochs=10)
        fifth = reference[-1]["passes"] // 5
        batch = run("batch", **same, pairing="batch", epochs=fifth // 4032)
    assert batch[-1]["passes"] <= fifth
    first = next((row for row in batch if row["roc_auc"] >= reference[-1]["roc_auc"]), None)
    assert first, "batch pairing did not reach the reference scheme's AUC in a fifth of its passes"
    print(
        f"batch pairing passes the reference scheme's {reference[-1]['roc_auc']:.4f} after "
        f"1/{reference[-1]['passes'] / first['passes']:.1f} of its passes and "
        f"1/{reference[-1]['seconds'] / first['seconds']:.1f} of its time"
    )


@main.command()
@click.option("--image_size", default=48)
@click.option("--rounds", default=7)
@click.option("--steps", default=12)
def pipeline(image_size: int, rounds: int, steps: int) -> None:
    """Median time of steps with loading over that of the same steps on preloaded tensors, losses compared."""
    data = omniglot()
    folder = scan_image_folder(data / "train")
    cache = PictureCache(folder, 2**30)
    cache.fill()
    for workers in (0, 1):
        config = TrainConfig.with_recipe(
            train_path=data / "train", val_path=data / "val", out_path=Path("unused"), pairing="batch",
            image_size=image_size, workers=workers, **COMMON,
        )  # fmt: skip
        sampler = epoch_sampler(folder, config, Processes(CPU))
        pictures = AugmentedPictures(cache, Preprocess((image_size, image_size)), Augmentation.of(config), config.seed)
        loader = training_batches(pictures, sampler, config, CPU)
        sampler.first_step = sampler.steps_per_epoch - steps
        ratios = []
        for round_number in range(rounds):
            sampler.epoch = round_number
            preloaded = list(loader)
            assert len(preloaded) == steps
            seconds, losses = [], []
            for batches in (preloaded, loader) if round_number % 2 else (loader, preloaded):
                torch.manual_seed(1)
                learner = Learner(
                    SiameseNetwork("resnet18", image_size), config, len(folder.class_names), 63, Processes(CPU)
                )
                learner.learn(preloaded[0], 0, 0)  # warm-up
                started, results = time.perf_counter(), []
                for step, batch in enumerate(batches):
                    results.append(learner.learn(batch, round_number, step))
                seconds.append(time.perf_counter() - started)
                losses.append([float(result.loss_sum) for result in results if result])
            assert losses[0] == losses[1]
            loading, tensors = seconds if round_number % 2 == 0 else seconds[::-1]
            ratios.append(loading / tensors)
        print(
            f"workers {workers}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True
        )


@main.command()
@click.option("--backbones", default="resnet18")
@click.option("--image_size", default=48)
@click.option("--device", default="cpu")
@click.option("--rounds", default=7)
def throughput(backbones: str, image_size: int, device: str, rounds: int) -> None:
    """Pictures a second of training steps in float32, and the ratio of the other ways to compute to it."""
    ways = {"channels_last": {"channels_last": True}, "bf16": {"amp": "bf16"}, "fp16": {"amp": "fp16"}}
    ways["bf16, channels_last"] = {"amp": "bf16", "channels_last": True}
    processes = Processes(torch.device(device))
    if device == "cpu":
        del ways["fp16"]  # emulated there
    print(torch.cuda.get_device_name() if device != "cpu" else "cpu", flush=True)
    pixels = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (64, image_size, image_size, 3), np.uint8))
    batch = Batch(pixels, torch.arange(16).repeat_interleave(4), [])
    for backbone in backbones.split(","):
        config = TrainConfig.with_recipe(
            train_path=Path("t"), val_path=Path("v"), out_path=Path("o"), pairing="batch",
            image_size=image_size, **(COMMON | {"backbone": backbone}),
        )  # fmt: skip
        seconds: dict[str, list[float]] = {}
        learners, first_losses = {}, {}
        for name, changes in {"float32": {}, **ways}.items():
            torch.manual_seed(1)
            model = SiameseNetwork(backbone, image_size).to(processes.device)
            learners[name] = Learner(model, replace(config, **changes), 203, 63, processes)
            result = learners[name].learn(batch, 0, 0)
            assert result
            first_losses[name] = float(result.loss_sum) / result.n_pairs
            assert abs(first_losses[name] / first_losses["float32"] - 1) < 0.02, first_losses
        for round_number in range(rounds):
            for name, learner in learners.items():
                started = time.perf_counter()
                for step in range(4):
                    result = learner.learn(batch, 0, 1 + 4 * round_number + step)
                    assert result
                float(result.loss_sum)  # waits for the device
                seconds.setdefault(name, []).append(time.perf_counter() - started)
        float32 = statistics.median(seconds["float32"])
        ratios = "  ".join(f"{name} x{float32 / statistics.median(seconds[name]):.2f}" for name in ways)
        print(f"{backbone:20} {4 * len(pixels) / float32:6.0f} images/s  {ratios}", flush=True)


@main.command()
@click.option("--image_size", default=32)
@click.option("--epochs", default=12)
def recipes(image_size: int, epochs: int) -> None:
    """The batch recipe with one part changed at a time, and built up from the reference's settings."""
    plain = {
        "optimizer": "adam", "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0, "identity_loss": 0.0,
        "shift": 0.2, "shear": 0.2, "fill": "black", "learning_rate": 1e-3,
    }  # fmt: skip
    parts: dict[str, dict[str, Any]] = {
        "pairs only": plain,
        "+ identity": plain | {"identity_loss": 1.0},
        "+ schedule": {"shift": 0.2, "shear": 0.2, "fill": "black"},
        "recipe": {},
        "P=32, K=4": {"classes_per_batch": 32},
        "P=8, K=8": {"classes_per_batch": 8, "images_per_class": 8},
        "identity 0.3": {"identity_loss": 0.3},
        "hard 1": {"hard_negatives": 1.0},
        "ema 0.99": {"ema": 0.99},
        "lr 1e-3": {"learning_rate": 1e-3},
    }
    for name, changes in parts.items():
        run(name, image_size=image_size, epochs=epochs, pairing="batch", save_after=epochs, **changes)


@main.command()
@click.option("--image_size", default=48)
@click.option("--epochs", default=40)
@click.option("--seed", default=1)
def best(image_size: int, epochs: int, seed: int) -> None:
    run("best", image_size=image_size, epochs=epochs, seed=seed, pairing="batch", save_after=max(1, epochs // 6))


if __name__ == "__main__":
    main()
