"""The training loop, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from siamese_deploy.durable_files import locked_folder, write_atomically
from siamese_deploy.errors import InputDataError, IntegrityError, UsageError, one_line
from siamese_deploy.evaluate import evaluate_pairs
from siamese_deploy.image_folder import SkippedFile, scan_image_folder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.report import skipped_csv
from siamese_deploy.result_folder import refuse_inside
from siamese_train.checkpoint import save_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.data import training_batches
from siamese_train.model import InputNormalisation, SiameseNetwork, load_initial_weights
from siamese_train.torch_verifier import TorchVerifier, choose_device

VALIDATION_SEED = 1
"""siamese-train-eval's default: its figures for best.pth are those of the training log, whatever --seed was."""


def train(config: TrainConfig) -> Path:
    """Train as `config` says; the folder config.out_path then holds best.pth, epoch_<n>.pth and summary/.

    Progress goes to stderr, a line per epoch to stdout.

    Returns:
        The path of best.pth, the checkpoint with the lowest validation loss.

    Raises:
        UsageError: the output path is a file or holds checkpoints already; an unknown backbone.
        BusyError: another run trains into the folder.
        InputDataError: the folders cannot give a batch of training pairs or any validation pair.
        IntegrityError: the loss is not finite; the checkpoints written so far stay.
        EnvironmentFault: the device or pretrained weights are not available.
    """
    _refuse_used_folder(config.out_path)
    for pictures in (config.train_path, config.val_path):
        refuse_inside(config.out_path, pictures)
    device = choose_device(config.device)
    preprocess = Preprocess((config.image_size, config.image_size))
    train_folder, val_folder = scan_image_folder(config.train_path), scan_image_folder(config.val_path)
    sample_pairs(train_folder)  # raises now, not after the network is built, if the classes cannot give pairs
    val_pairs = sample_pairs(val_folder, VALIDATION_SEED)
    sampler, loader = training_batches(
        train_folder,
        preprocess,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    if len(sampler) == 0:
        raise InputDataError(
            f"{config.train_path}: {len(train_folder)} pictures are fewer than one batch of {config.batch_size}; "
            "add pictures or lower --batch_size"
        )

    torch.manual_seed(config.seed)
    model = SiameseNetwork(config.backbone, config.image_size)
    load_initial_weights(model, config.backbone, config.weights)
    model.to(device)
    normalise = InputNormalisation().to(device)
    verifier = TorchVerifier(model, preprocess, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    criterion = nn.BCELoss()

    data = {
        "train_classes": len(train_folder.class_names),
        "train_images": len(train_folder),
        "val_classes": len(val_folder.class_names),
        "val_images": len(val_folder),
    }
    print(
        f"{config.backbone} on {device}: {data['train_images']} training pictures in {data['train_classes']} classes, "
        f"{data['val_images']} validation pictures in {data['val_classes']} classes",
        flush=True,
    )
    best_loss = math.inf
    skipped: dict[str, SkippedFile] = {}
    _note_skipped(skipped, config.train_path, train_folder.skipped)
    n_reported = 0
    started = time.monotonic()

    with (
        locked_folder(config.out_path),
        SummaryWriter(str(config.out_path / "summary")) as writer,
        interrupts_held() as let_interrupts_through,
    ):
        _refuse_used_folder(config.out_path)  # again, now that no other run can be filling it
        for epoch in range(config.epochs):
            # learn
            sampler.epoch = epoch
            model.train()
            loss_sum = torch.zeros((), device=device)
            correct = torch.zeros((), device=device)
            n_pairs = 0
            epoch_started = time.monotonic()
            with _progress_bar(config, epoch, len(sampler)) as progress:
                for batch in loader:
                    _note_skipped(skipped, config.train_path, batch.skipped)
                    if len(batch.is_same) >= 2:  # BatchNorm cannot learn from one pair
                        left, right, is_same = (
                            tensor.to(device, non_blocking=True) for tensor in (batch.left, batch.right, batch.is_same)
                        )
                        scores = model(normalise(left), normalise(right))
                        if not bool(torch.isfinite(scores).all()):  # the loss would end a CUDA process on NaN
                            raise IntegrityError(_not_finite("training", epoch, config))
                        loss = criterion(scores, is_same)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                        loss_sum += loss.detach() * len(is_same)
                        correct += ((scores.detach() >= 0.5) == (is_same == 1)).sum()
                        n_pairs += len(is_same)
                    progress.update(2 * config.batch_size)
                    let_interrupts_through()
            images_per_s = 2 * n_pairs / (time.monotonic() - epoch_started)
            if n_pairs == 0:
                raise InputDataError(f"{config.train_path}: no training pair can be read; {_first_reason(skipped)}")
            train_loss, train_acc = float(loss_sum) / n_pairs, float(correct) / n_pairs

            # validate, with the code that evaluates a bundle
            try:
                evaluation = evaluate_pairs(verifier, val_folder, val_pairs)
            except IntegrityError as error:
                raise IntegrityError(_not_finite("validation", epoch, config)) from error

            validation = evaluation.metrics
            _note_skipped(skipped, config.val_path, evaluation.skipped)

            # record
            metrics = {
                "train_loss": train_loss,
                "train_acc": train_acc,
                "val_loss": validation.loss,
                "val_acc": validation.accuracy,
            }
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            names = ["best.pth"] if validation.loss < best_loss else []
            names += [f"epoch_{epoch + 1}.pth"] if (epoch + 1) % config.save_after == 0 else []
            best_loss = min(best_loss, validation.loss)
            for name in names:
                save_checkpoint(
                    config.out_path / name,
                    epoch=epoch + 1,
                    model=model,
                    optimizer=optimizer,
                    config=config,
                    data=data | {"val_pairs": len(evaluation.pairs), "val_pair_digest": evaluation.pair_digest},
                    metrics=metrics,
                )
            left_s = (time.monotonic() - started) / (epoch + 1) * (config.epochs - epoch - 1)
            print(
                f"epoch {epoch + 1}/{config.epochs}  "
                f"train loss {train_loss:.4f} acc {train_acc:.4f}  "
                f"val loss {validation.loss:.4f} acc {validation.accuracy:.4f}  "
                f"{images_per_s:.0f} images/s  {tqdm.format_interval(left_s)} left"
                + (f"  -> {', '.join(names)}" if names else ""),
                flush=True,
            )
            if len(skipped) > n_reported:
                n_reported = len(skipped)
                listing = config.out_path / "skipped_pictures.csv"
                write_atomically(listing, lambda file: file.write(skipped_csv(list(skipped.values()))))
                print(
                    one_line(f"skipped {len(skipped)} files ({_first_reason(skipped)}); see {listing}"), file=sys.stderr
                )
    return config.out_path / "best.pth"


def _refuse_used_folder(out_path: Path) -> None:
    if out_path.exists() and not out_path.is_dir():
        raise UsageError(f"{out_path}: is a file; expected a folder for checkpoints")
    checkpoints = sorted(file.name for file in out_path.glob("*.pth"))
    if checkpoints:
        raise UsageError(
            f"{out_path}: holds checkpoints of an earlier run ({checkpoints[0]}, ...); choose another folder"
        )


def _progress_bar(config: TrainConfig, epoch: int, steps: int) -> tqdm:
    return tqdm(
        total=2 * config.batch_size * steps,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        unit="image",
        leave=False,
        disable=None,  # off where stderr is no terminal
    )


def _note_skipped(skipped: dict[str, SkippedFile], root: Path, files: Iterable[SkippedFile]) -> None:
    """Once for each file, with its root: a training and a validation picture may have the same name."""
    for file in files:
        path = str(root / file.path)
        skipped.setdefault(path, SkippedFile(path, file.reason))


def _first_reason(skipped: dict[str, SkippedFile]) -> str:
    first = next(iter(skipped.values()))
    return f"first: {first.path}: {first.reason}"


def _not_finite(what: str, epoch: int, config: TrainConfig) -> str:
    return (
        f"{what} gave NaN or infinity in epoch {epoch + 1} at learning rate {config.learning_rate}; what is saved in "
        f"{config.out_path} is good; start again with a smaller --learning_rate"
    )
