"""The training loop, top to bottom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from siamese_deploy.cli.run_log import log, log_at_end, log_skipped, warn
from siamese_deploy.dataset_check.quick import quick_line
from siamese_deploy.durable_files import locked_folder, write_atomically
from siamese_deploy.embedding import ImageEmbeddings, embed_images
from siamese_deploy.errors import EnvironmentFault, InputDataError, IntegrityError, UsageError, one_line
from siamese_deploy.evaluate import evaluate_embedded, evaluate_pairs
from siamese_deploy.image_folder import ImageFolder, SkippedFile, scan_image_folder
from siamese_deploy.interrupts import interrupts_held
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.pairs_csv import skipped_csv
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.result_folder import refuse_inside
from siamese_train.augment import Augmentation
from siamese_train.checkpoint import save_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.data import (
    AugmentedPictures,
    EmbeddedPictures,
    EpochSampler,
    Item,
    batches_of,
    epoch_sampler,
    training_batches,
)
from siamese_train.learner import Learner, learning_rate_at
from siamese_train.model import SiameseNetwork
from siamese_train.picture_cache import PictureCache
from siamese_train.processes import Processes, joined_processes
from siamese_train.resume import Progress, resume
from siamese_train.summary import Summary
from siamese_train.torch_verifier import TorchVerifier
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
        EnvironmentFault: the device or pretrained weights are not available; the pictures are gone, the run is saved.
    """
    if not config.resume:
        _refuse_used_folder(config.out_path)
    for pictures in (config.train_path, config.val_path):
        refuse_inside(config.out_path, pictures)
    with joined_processes(config.device) as processes:
        _train(config, processes)
    return config.out_path / "best.pth"


def _train(config: TrainConfig, processes: Processes) -> None:
    device = processes.device
    preprocess = Preprocess((config.image_size, config.image_size))
    train_folder, val_folder = scan_image_folder(config.train_path), scan_image_folder(config.val_path)
    sample_pairs(train_folder)  # raises now, not after the network is built, if the classes cannot give pairs
    val_pairs = sample_pairs(val_folder, VALIDATION_SEED)
    n_classes = len(train_folder.class_names)
    sampler = epoch_sampler(train_folder, config, processes)
    n_steps = sampler.steps_per_epoch
    _check_batches(config, sampler, train_folder, processes.count)

    torch.manual_seed(config.seed)
    model = SiameseNetwork(config.backbone, config.image_size, config.embedding_dim)
    if not config.resume or not any(config.out_path.glob("*.pth")):
        whole = load_initial_weights(model, config.backbone, config.weights, config.embedding_dim)
        if config.freeze_backbone and not whole:
            raise UsageError(
                "--freeze_backbone: --weights gives no learned weights to all layers of the backbone "
                "(--embedding_dim makes a new last one); give a file of weights that has them"
            )
    learner = Learner(model.to(device), config, n_classes, n_steps, processes)
    verifier = TorchVerifier(learner.validated_model, preprocess, device)

    data = {
        "train_classes": n_classes,
        "train_images": len(train_folder),
        "train_digest": train_folder.digest(),
        "val_classes": len(val_folder.class_names),
        "val_images": len(val_folder),
        "val_digest": val_folder.digest(),
    }
    if processes.is_first:
        _print_start(config, data, processes)
        for line in filter(None, map(quick_line, (train_folder, val_folder))):
            print(line, flush=True)
            log("warning", "data-set", line)
        if config.train_path.resolve() == config.val_path.resolve():
            print("training and validation pictures are the same: the figures say nothing of new ones", flush=True)
    skipped = _SkippedPictures(config.out_path / "skipped_pictures.csv")
    skipped.add(config.train_path, train_folder.skipped)

    with locked_folder(config.out_path) if processes.is_first else nullcontext():
        if config.resume:
            progress = resume(config, data, learner) or Progress()
        else:
            progress = Progress()
        processes.wait()  # until all have read what the first one is about to write
        if processes.is_first:
            if not config.resume:
                _refuse_used_folder(config.out_path)  # again, now that no other run can be filling it
            for name in ("*.pth", "metrics.jsonl", "config.json", skipped.listing.name):
                for stale in config.out_path.glob(f".{name}.*.tmp"):  # of a killed run: the lock proves that none lives
                    stale.unlink()
            _write_json(config.out_path / "config.json", config.to_json())
            summary = _summary(config, progress.epoch)
            _warn_of_little_space(config.out_path, learner)

        def save(name: str) -> None:
            run = {
                "data": data,
                "device": device.type,
                "progress": asdict(progress),
                "learner": learner.state(),
                "metrics": progress.history[-1] if progress.history else {},
                "validation": progress.validation,
            }
            save_checkpoint(
                config.out_path / name,
                epoch=progress.epoch,
                model=learner.validated_model,
                optimizer=learner.optimizer,
                config=config,
                run=run,
            )

        def leave_epoch_behind() -> list[str]:
            """Write what a completed epoch leaves, as far as the disk allows; the names of the checkpoints written."""
            _if_possible(partial(_write_lines, config.out_path / "metrics.jsonl", progress.history))
            return [name for name in progress.due if _if_possible(partial(save, name))]

        if processes.is_first:
            leave_epoch_behind()
        stop = _stops_early(config, progress)
        val_embeddings: ImageEmbeddings | None = None
        if progress.epoch < config.epochs and not stop:
            pictures: Dataset[Item]
            if config.freeze_backbone:
                show = processes.is_first and sys.stderr.isatty()
                train_images, val_images = np.arange(len(train_folder)), val_pairs.unique_images()
                train_embeddings = embed_images(verifier, train_folder, train_images, show_progress=show)
                skipped.add(config.train_path, train_embeddings.skipped)
                pictures = EmbeddedPictures(train_folder, train_embeddings)
                if processes.is_first:
                    val_embeddings = embed_images(verifier, val_folder, val_images)
            else:
                cache = PictureCache(train_folder, config.cache_mib * 2**20)
                cache.fill(show_progress=processes.is_first and sys.stderr.isatty())
                pictures = AugmentedPictures(cache, preprocess, Augmentation.of(config), config.seed)
            loader = training_batches(pictures, sampler, config, device)

        def let_interrupts_through(save: Callable[[], object]) -> None:
            """At the same step in all processes, after the first one has saved."""
            if processes.count == 1:
                interrupts(save)
            elif processes.any(interrupts.arrived is not None):
                if processes.is_first:
                    save()
                processes.wait()
                interrupts()
                sys.exit(128 + signal.SIGTERM)

        saved_at, started, first_epoch = time.monotonic(), time.monotonic(), progress.epoch
        # torchrun passes a signal on that its processes may have got already.
        with interrupts_held(second_ends="TORCHELASTIC_RUN_ID" not in os.environ) as interrupts:
            while progress.epoch < config.epochs and not stop:
                # learn
                epoch, progress.due = progress.epoch, []
                sampler.epoch, sampler.first_step = epoch, progress.step
                loss_sum = torch.tensor(progress.loss_sum, device=device)
                correct = torch.tensor(float(progress.correct), device=device)  # a whole number in older checkpoints
                n_images, epoch_started = 0, time.monotonic()

                def save_within_epoch(loss_sum: torch.Tensor = loss_sum, correct: torch.Tensor = correct) -> None:
                    progress.loss_sum, progress.correct = float(loss_sum), float(correct)
                    save("last.pth")

                with _progress_bar(config, sampler, epoch, silent=not processes.is_first) as bar:
                    for batch in batches_of(loader):
                        skipped.add(config.train_path, batch.skipped)
                        if batch.skipped:
                            with _saved_first(save_within_epoch) if processes.is_first else nullcontext():
                                train_folder.require_still_there()
                        try:
                            result = learner.learn(batch, epoch, progress.step)
                        except IntegrityError as error:
                            raise IntegrityError(_not_finite("training", epoch, config), code="not-finite") from error
                        if result:
                            loss_sum += result.loss_sum  # in place, as save_within_epoch reads it
                            correct += result.correct
                            progress.n_pairs += result.n_pairs
                            n_images += result.n_images
                        progress.step += 1
                        bar.update()
                        if processes.is_first and time.monotonic() - saved_at >= 60 * config.save_minutes:
                            _if_possible(save_within_epoch)
                            saved_at = time.monotonic()
                        let_interrupts_through(save_within_epoch)
                images_per_s = n_images / (time.monotonic() - epoch_started)
                if progress.n_pairs == 0:
                    raise InputDataError(
                        f"{config.train_path}: no training pair can be read; {skipped.first()}", code="no-pictures"
                    )
                skipped.gather(processes)

                if processes.is_first:
                    # validate, with the code that evaluates a bundle
                    try:
                        with _saved_first(save_within_epoch):
                            if val_embeddings:
                                evaluation = evaluate_embedded(verifier, val_folder, val_pairs, val_embeddings)
                            else:
                                evaluation = evaluate_pairs(verifier, val_folder, val_pairs)
                    except IntegrityError as error:
                        raise IntegrityError(_not_finite("validation", epoch, config), code="not-finite") from error
                    skipped.add(config.val_path, evaluation.skipped)

                    # record
                    metrics = {
                        "train_loss": float(loss_sum) / progress.n_pairs,
                        "train_acc": float(correct) / progress.n_pairs,
                        "val_loss": evaluation.metrics.loss,
                        "val_acc": evaluation.metrics.accuracy,
                        "learning_rate": learning_rate_at((epoch + 1) * n_steps - 1, n_steps, config),
                    }
                    if evaluation.metrics.roc_auc is not None:
                        metrics["val_roc_auc"] = evaluation.metrics.roc_auc
                    is_best = metrics["val_loss"] < progress.best_loss
                    progress.stale_epochs = 0 if is_best else progress.stale_epochs + 1
                    scalars = metrics | {"images_per_s": images_per_s}
                    if summary:
                        _if_possible(partial(summary.add, epoch, scalars, evaluation, with_pictures=is_best))
                    progress.history.append({"epoch": epoch + 1, **metrics})
                    progress.validation = {
                        "val_pairs": len(evaluation.pairs),
                        "val_pair_digest": evaluation.pair_digest,
                    }
                progress.epoch += 1
                progress.begin_epoch()
                if processes.is_first:
                    progress.due = ["best.pth"] if is_best else []
                    progress.due += [f"epoch_{epoch + 1}.pth"] if (epoch + 1) % config.save_after == 0 else []
                    best_before, progress.best_loss = progress.best_loss, min(progress.best_loss, metrics["val_loss"])
                    names = leave_epoch_behind()
                    if "best.pth" in progress.due and "best.pth" not in names:
                        progress.best_loss = best_before  # so that the next good one is saved
                    left_s = (
                        (time.monotonic() - started) / (progress.epoch - first_epoch) * (config.epochs - progress.epoch)
                    )
                    _print_epoch(config, epoch, metrics, images_per_s, left_s, names)
                    log_at_end(epochs=progress.epoch, out_path=str(config.out_path))
                    skipped.report()
                let_interrupts_through(partial(save, "last.pth"))
                stop = processes.any(processes.is_first and _stops_early(config, progress))
            if processes.is_first:
                if stop:
                    print(f"stopped early: no lower validation loss for {config.early_stopping} epochs", flush=True)
                save("last.pth")
                if summary:
                    _if_possible(summary.close)


def _check_batches(config: TrainConfig, sampler: EpochSampler, folder: ImageFolder, n_processes: int) -> None:
    if sampler.steps_per_epoch == 0:
        raise InputDataError(
            f"{config.train_path}: {len(folder)} pictures are fewer than one batch of {config.batch_size}; "
            "add pictures or lower --batch_size",
            code="too-few-pictures",
        )
    # Two pairs for the head's BatchNorm, and two pictures in every process for the backbone's.
    least = 2 * n_processes if config.pairing == "reference" else max(3, 2 * n_processes)
    if sampler.smallest_step < least:
        raise UsageError(
            f"a step of {sampler.smallest_step} {'pairs' if config.pairing == 'reference' else 'pictures'} is too "
            f"small for {n_processes} processes, which need {least}; raise --batch_size or --classes_per_batch"
        )


def _stops_early(config: TrainConfig, progress: Progress) -> bool:
    return 0 < config.early_stopping <= progress.stale_epochs


def _print_start(config: TrainConfig, data: dict[str, Any], processes: Processes) -> None:
    where = str(processes.device) if processes.count == 1 else f"{processes.count} {processes.device.type} processes"
    print(
        f"{config.backbone} on {where}: {data['train_images']} training pictures in {data['train_classes']} classes, "
        f"{data['val_images']} validation pictures in {data['val_classes']} classes",
        flush=True,
    )
    if config.pairing == "batch" and data["train_classes"] < config.classes_per_batch:
        print(
            f"batches have {data['train_classes']} classes, not {config.classes_per_batch}: there are no more",
            flush=True,
        )


def _print_epoch(
    config: TrainConfig, epoch: int, metrics: dict[str, float], images_per_s: float, left_s: float, names: list[str]
) -> None:
    print(
        f"epoch {epoch + 1}/{config.epochs}  "
        f"train loss {metrics['train_loss']:.4f} acc {metrics['train_acc']:.4f}  "
        f"val loss {metrics['val_loss']:.4f} acc {metrics['val_acc']:.4f}"
        + (f" AUC {metrics['val_roc_auc']:.4f}" if "val_roc_auc" in metrics else "")
        + f"  {images_per_s:.0f} images/s  {tqdm.format_interval(left_s)} left"
        + (f"  -> {', '.join(names)}" if names else ""),
        flush=True,
    )


class _SkippedPictures:
    """Files that could not be used, each once and with its root; listed in a CSV file that grows with them."""

    def __init__(self, listing: Path) -> None:
        self.listing = listing
        self._files: dict[str, SkippedFile] = {}
        self._n_reported = 0

    def add(self, root: Path, files: Iterable[SkippedFile]) -> None:
        for file in files:
            path = str(root / file.path)
            self._files.setdefault(path, SkippedFile(path, file.reason, file.code))

    def gather(self, processes: Processes) -> None:
        """Add those of the other processes."""
        mine = json.dumps([(file.path, file.reason, file.code) for file in self._files.values()])
        for text in processes.texts(mine):
            for path, reason, code in json.loads(text):
                self._files.setdefault(path, SkippedFile(path, reason, code))

    def first(self) -> str:
        for file in self._files.values():
            return f"first: {file.path}: {file.reason}"
        return "raise --classes_per_batch or --images_per_class"

    def report(self) -> None:
        if len(self._files) > self._n_reported:
            log_skipped(None, list(self._files.values())[self._n_reported :])
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
            "choose another folder",
            code="output-exists",
        )


def _if_possible(write: Callable[[], object]) -> bool:
    """Write; a full disk or the like is said and costs only this file: the earlier one is still there."""
    try:
        write()
    except OSError as error:
        warn("not-saved", f"not saved: {error.filename or 'file'}: {error.strerror}; training goes on")
        return False
    return True


@contextmanager
def _saved_first(save: Callable[[], object]) -> Iterator[None]:
    """Pictures that are gone end the run, which goes on where it was once they are back."""
    try:
        yield
    except EnvironmentFault as error:
        if _if_possible(save):
            raise EnvironmentFault(f"{error} The run is saved; --resume goes on", code=error.code) from error
        raise


def _summary(config: TrainConfig, first_epoch: int) -> Summary | None:
    """None where TensorBoard's file cannot be made: metrics.jsonl has the figures too."""
    try:
        return Summary(config.out_path / "summary", config, first_epoch)
    except OSError as error:
        warn("not-saved", f"no TensorBoard summary: {error.filename or 'file'}: {error.strerror}")
        return None


def _warn_of_little_space(out_path: Path, learner: Learner) -> None:
    """A checkpoint holds each weight and two moments; best.pth, last.pth and the one being written take room."""
    needed = 3 * 3 * sum(tensor.nbytes for tensor in learner.model.state_dict().values())
    free = shutil.disk_usage(out_path).free
    if free < needed:
        warn(
            "low-space",
            f"warning: {out_path}: {free / 2**20:,.0f} MiB free, and best.pth, last.pth and a temporary file take "
            f"{needed / 2**20:,.0f} MiB; checkpoints that do not fit are not saved",
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def _write_lines(path: Path, rows: list[dict[str, float]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def _progress_bar(config: TrainConfig, sampler: EpochSampler, epoch: int, *, silent: bool) -> tqdm:
    return tqdm(
        total=sampler.steps_per_epoch,
        initial=sampler.first_step,
        desc=f"epoch {epoch + 1}/{config.epochs}",
        unit="image",
        unit_scale=sampler.images_per_epoch / sampler.steps_per_epoch,
        leave=False,
        disable=silent or None,  # None: off where stderr is no terminal
    )


def _not_finite(what: str, epoch: int, config: TrainConfig) -> str:
    return (
        f"{what} gave NaN or infinity in epoch {epoch + 1} at learning rate {config.learning_rate}; what is saved in "
        f"{config.out_path} is good; start again with a smaller --learning_rate"
    )
