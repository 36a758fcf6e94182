"""ImageFolder and Pairs -> training batches, the same at any number of worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from siamese_deploy.errors import ImageError
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.preprocess import Preprocess, decode_image, resize_image
from siamese_train.augment import augment


class PairKey(NamedTuple):
    """One training pair: its place in the run, which seeds its augmentation, and what it consists of."""

    epoch: int
    position: int
    left: int
    right: int
    is_same: bool


class PairBatch(NamedTuple):
    left: torch.Tensor
    """(B, H, W, 3) uint8."""
    right: torch.Tensor
    """(B, H, W, 3) uint8."""
    is_same: torch.Tensor
    """(B, 1) float32, 1 = same."""
    skipped: list[SkippedFile]
    """Pictures that could not be read; their pairs are not in the batch."""


class EpochSampler(Sampler[list[PairKey]]):
    """Batches of a new shuffled pair list each epoch, drawn from (seed, epoch); a last short batch is dropped.

    `epoch` and `first_step` say where the next iteration begins.
    """

    def __init__(self, folder: ImageFolder, batch_size: int, seed: int) -> None:
        self.folder, self.batch_size, self.seed = folder, batch_size, seed
        self.epoch = 0
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.folder) // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[PairKey]]:
        pairs = sample_pairs(self.folder, (self.seed, self.epoch), shuffle=True)
        keys = [
            PairKey(self.epoch, position, *pair)
            for position, pair in enumerate(
                zip(pairs.left.tolist(), pairs.right.tolist(), pairs.is_same.tolist(), strict=True)
            )
        ]
        for step in range(self.first_step, self.steps_per_epoch):
            yield keys[step * self.batch_size : (step + 1) * self.batch_size]


class AugmentedPairs(Dataset[tuple[np.ndarray, np.ndarray, bool] | SkippedFile]):
    def __init__(self, folder: ImageFolder, preprocess: Preprocess, seed: int) -> None:
        self.folder, self.preprocess, self.seed = folder, preprocess, seed

    def __getitem__(self, key: PairKey) -> tuple[np.ndarray, np.ndarray, bool] | SkippedFile:
        # A sequence of seeds, as NumPy recommends for independent streams.
        random = np.random.default_rng([self.seed, key.epoch, key.position])
        sides = []
        for image in (key.left, key.right):
            try:
                picture = decode_image(self.folder.absolute_path(image))
            except ImageError as error:
                return SkippedFile(self.folder.paths[image], error.reason)
            sides.append(resize_image(augment(picture, random), self.preprocess.size_hw))
        return sides[0], sides[1], key.is_same


def training_batches(
    folder: ImageFolder, preprocess: Preprocess, *, batch_size: int, seed: int, workers: int, pin_memory: bool
) -> tuple[EpochSampler, DataLoader[PairBatch]]:
    """The sampler, which says where an iteration begins, and the loader that iterates over it."""
    sampler = EpochSampler(folder, batch_size, seed)
    loader: DataLoader[PairBatch] = DataLoader(
        AugmentedPairs(folder, preprocess, seed),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # An own generator: the loader draws from it at each start, and dropout's must not depend on how often that was.
        generator=torch.Generator(),
    )
    return sampler, loader


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C and `systemctl stop` reach the whole process group; the training process saves and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[tuple[np.ndarray, np.ndarray, bool] | SkippedFile]) -> PairBatch:
    skipped = [item for item in items if isinstance(item, SkippedFile)]
    pairs = [item for item in items if not isinstance(item, SkippedFile)]
    empty = np.empty((0, 1, 1, 3), np.uint8)
    return PairBatch(
        torch.from_numpy(np.stack([pair[0] for pair in pairs]) if pairs else empty),
        torch.from_numpy(np.stack([pair[1] for pair in pairs]) if pairs else empty),
        torch.tensor([[float(pair[2])] for pair in pairs]),
        skipped,
    )
