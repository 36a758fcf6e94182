"""The training loop, top to bottom."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

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
from siamese_train.data import EpochSampler, training_batches
from siamese_train.model import InputNormalisation, SiameseNetwork
from siamese_train.resume import Progress, random_state, resume
from siamese_train.torch_verifier import TorchVerifier, choose_device
from siamese_train.weights import load_initial_weights

VALIDATION_SEED = 1
"""siamese-train-eval's default: its figures for best.pth are those of the training log, whatever --seed was."""


def train(config: TrainConfig) -> Path:
    """Train as `config` says; the folder config.out_path then holds best.pth, epoch_<n>.pth, last.pth and summary/.

    A run that was interrupted at any moment and resumed ends in the same weights as one that was not (on the CPU, bit
    for bit; on CUDA as far as PyTorch's kernels are deterministic).

    Progress goes to stderr, a line per epoch to stdout.

    Returns:
        The path of best.pth, the checkpoint with the lowest validation loss.

    Raises:
        UsageError: the output path is a file or holds checkpoints already (without `resume`); an unknown backbone;
            changed settings (with `resume`).
        CheckpointError: none of the checkpoints to resume is good.
        BusyError: another run trains into the folder.
        InputDataError: the folders cannot give a batch of training pairs or any validation pair.
        IntegrityError: the loss is not finite; the checkpoints written so far stay.
        EnvironmentFault: the device or pretrained weights are not available.
    """
    if not config.resume:
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
    if not config.resume or not any(config.out_path.glob("*.pth")):
        load_initial_weights(model, config.backbone, config.weights)
    model.to(device)
    normalise = InputNormalisation().to(device)
    verifier = TorchVerifier(model, preprocess, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    criterion = nn.BCELoss()

    data = {
        "train_classes": len(train_folder.class_names),
        "train_images": len(train_folder),
        "train_digest": train_folder.digest(),
        "val_classes": len(val_folder.class_names),
        "val_images": len(val_folder),
        "val_digest": val_folder.digest(),
    }
    print(
        f"{config.backbone} on {device}: {data['train_images']} training pictures in {data['train_classes']} classes, "
        f"{data['val_images']} validation pictures in {data['val_classes']} classes",
        flush=True,
    )
    skipped = _SkippedPictures(config.out_path / "skipped_pictures.csv")
    skipped.add(config.train_path, train_folder.skipped)

    with locked_folder(config.out_path), interrupts_held() as let_interrupts_through:
        if config.resume:
            progress = resume(config, data, device, model, optimizer) or Progress()
        else:
            _refuse_used_folder(config.out_path)  # again, now that no other run can be filling it
            progress = Progress()
        for name in ("*.pth", "metrics.jsonl", "config.json", skipped.listing.name):
            for stale in config.out_path.glob(f".{name}.*.tmp"):  # of a killed run: the lock proves that none is alive
                stale.unlink()
        _write_json(config.out_path / "config.json", config.to_json())
        writer = SummaryWriter(str(config.out_path / "summary"), purge_step=progress.epoch)
        saved_at, started, first_epoch = time.monotonic(), time.monotonic(), progress.epoch

        def save(name: str) -> None:
            run = {
                "data": data,
                "device": device.type,
                "progress": asdict(progress),
                "random": random_state(device),
                "metrics": progress.history[-1] if progress.history else {},
                "validation": progress.validation,
            }
            path = config.out_path / name
            save_checkpoint(path, epoch=progress.epoch, model=model, optimizer=optimizer, config=config, run=run)

        def leave_epoch_behind() -> list[str]:
            """Write what a completed epoch leaves, as far as the disk allows; the names of the checkpoints written."""
            _if_possible(partial(_write_lines, config.out_path / "metrics.jsonl", progress.history))
            return [name for name in progress.due if _if_possible(partial(save, name))]

        leave_epoch_behind()
        while progress.epoch < config.epochs:
            # learn
            epoch, progress.due = progress.epoch, []
            sampler.epoch, sampler.first_step = epoch, progress.step
            model.train()
            loss_sum = torch.tensor(progress.loss_sum, device=device)
            correct = torch.tensor(progress.correct, device=device)
            n_images, epoch_started = 0, time.monotonic()

            def save_within_epoch(loss_sum: torch.Tensor = loss_sum, correct: torch.Tensor = correct) -> None:
                progress.loss_sum, progress.correct = float(loss_sum), int(correct)
                save("last.pth")

            with _progress_bar(config, epoch, sampler) as bar:
                for batch in loader:
                    skipped.add(config.train_path, batch.skipped)
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
                        loss_sum += loss.detach() * len(is_same)  # in place, as save_within_epoch reads it
                        correct += ((scores.detach() >= 0.5) == (is_same == 1)).sum()
                        progress.n_pairs += len(is_same)
                        n_images += 2 * len(is_same)
                    progress.step += 1
                    bar.update(2 * config.batch_size)
                    if time.monotonic() - saved_at >= 60 * config.save_minutes:
                        _if_possible(save_within_epoch)
                        saved_at = time.monotonic()
                    let_interrupts_through(save_within_epoch)
            images_per_s = n_images / (time.monotonic() - epoch_started)
            if progress.n_pairs == 0:
                raise InputDataError(f"{config.train_path}: no training pair can be read; {skipped.first()}")

            # validate, with the code that evaluates a bundle
            try:
                evaluation = evaluate_pairs(verifier, val_folder, val_pairs)
            except IntegrityError as error:
                raise IntegrityError(_not_finite("validation", epoch, config)) from error
            skipped.add(config.val_path, evaluation.skipped)

            # record
            metrics = {
                "train_loss": float(loss_sum) / progress.n_pairs,
                "train_acc": int(correct) / progress.n_pairs,
                "val_loss": evaluation.metrics.loss,
                "val_acc": evaluation.metrics.accuracy,
            }
            for name, value in metrics.items():
                _if_possible(partial(writer.add_scalar, name, value, epoch))
            progress.history.append({"epoch": epoch + 1, **metrics})
            progress.validation = {"val_pairs": len(evaluation.pairs), "val_pair_digest": evaluation.pair_digest}
            progress.epoch += 1
            progress.begin_epoch()
            progress.due = ["best.pth"] if metrics["val_loss"] < progress.best_loss else []
            progress.due += [f"epoch_{epoch + 1}.pth"] if (epoch + 1) % config.save_after == 0 else []
            best_before, progress.best_loss = progress.best_loss, min(progress.best_loss, metrics["val_loss"])
            names = leave_epoch_behind()
            if "best.pth" in progress.due and "best.pth" not in names:
                progress.best_loss = best_before  # so that the next good one is saved
            left_s = (time.monotonic() - started) / (progress.epoch - first_epoch) * (config.epochs - progress.epoch)
            print(
                f"epoch {epoch + 1}/{config.epochs}  "
                f"train loss {metrics['train_loss']:.4f} acc {metrics['train_acc']:.4f}  "
                f"val loss {metrics['val_loss']:.4f} acc {metrics['val_acc']:.4f}  "
                f"{images_per_s:.0f} images/s  {tqdm.format_interval(left_s)} left"
                + (f"  -> {', '.join(names)}" if names else ""),
                flush=True,
            )
            skipped.report()
            let_interrupts_through(partial(save, "last.pth"))
        save("last.pth")
        writer.close()
    return config.out_path / "best.pth"


class _SkippedPictures:
    """Files that could not be used, each once and with its root; listed in a CSV file that grows with them."""

    def __init__(self, listing: Path) -> None:
        self.listing = listing
        self._files: dict[str, SkippedFile] = {}
        self._n_reported = 0

    def add(self, root: Path, files: Iterable[SkippedFile]) -> None:
        for file in files:
            path = str(root / file.path)
            self._files.setdefault(path, SkippedFile(path, file.reason))

    def first(self) -> str:
        file = next(iter(self._files.values()))
        return f"first: {file.path}: {file.reason}"

    def report(self) -> None:
        if len(self._files) > self._n_reported:
            self._n_reported = len(self._files)
            content = skipped_csv(list(self._files.values()))
            _if_possible(partial(write_atomically, self.listing, lambda file: file.write(content)))
            message = f"skipped {len(self._files)} files ({self.first()}); see {self.listing}"
            print(one_line(message), file=sys.stderr)


def _refuse_used_folder(out_path: Path) -> None:
    if out_path.exists() and not out_path.is_dir():
        raise UsageError(f"{out_path}: is a file; expected a folder for checkpoints")
    checkpoints = sorted(file.name for file in out_path.glob("*.pth"))
    if checkpoints:
        raise UsageError(
            f"{out_path}: holds checkpoints of an earlier run ({checkpoints[0]}, ...); go on with it by --resume, or "
            "choose another folder"
        )


def _if_possible(write: Callable[[], object]) -> bool:
    """Write; a full disk or the like is said and costs only this file: the earlier one is still there."""
    try:
        write()
    except OSError as error:
        print(
            one_line(f"not saved: {error.filename or 'file'}: {error.strerror}; training goes on"),
            file=sys.stderr,
        )
        return False
    return True


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def _write_lines(path: Path, rows: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def _progress_bar(config: TrainConfig, epoch: int, sampler: EpochSampler) -> tqdm:
    return tqdm(
        total=2 * config.batch_size * sampler.steps_per_epoch,
        initial=2 * config.batch_size * sampler.first_step,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        unit="image",
        leave=False,
        disable=None,  # off where stderr is no terminal
    )


def _not_finite(what: str, epoch: int, config: TrainConfig) -> str:
    return (
        f"{what} gave NaN or infinity in epoch {epoch + 1} at learning rate {config.learning_rate}; what is saved in "
        f"{config.out_path} is good; start again with a smaller --learning_rate"
    )
