"""ImageFolder -> training batches, the same at any number of worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from siamese_deploy.embedding import ImageEmbeddings
from siamese_deploy.errors import ImageError
from siamese_deploy.image_folder import ImageFolder, SkippedFile
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.preprocess import Preprocess, resize_image
from siamese_train.augment import Augmentation
from siamese_train.config import TrainConfig
from siamese_train.picture_cache import PictureCache
from siamese_train.processes import Processes

Steps = list[npt.NDArray[np.int64]]
"""The pictures (indices into ImageFolder.paths) of each step of an epoch, (2, n_pairs) or (1, n_pictures)."""


class PictureKey(NamedTuple):
    """One picture of a batch: its place in the run, which seeds its augmentation, and its index in the folder."""

    epoch: int
    position: int
    image: int


class Batch(NamedTuple):
    inputs: torch.Tensor
    """(N, H, W, 3) uint8; of a frozen backbone (N, dim) float32 embeddings."""
    labels: torch.Tensor
    """(N,) int64 index of the class."""
    skipped: list[SkippedFile]
    """Pictures that could not be read; they, or in reference pairing their pairs, are not in the batch."""


def reference_steps(folder: ImageFolder, batch_size: int, seed: int, epoch: int) -> Steps:
    """(2, batch_size) per step, left above right, of a new pair list each epoch; a last short batch is dropped."""
    pairs = sample_pairs(folder, (seed, epoch), shuffle=True)
    both = np.stack([pairs.left, pairs.right])
    return [both[:, i * batch_size : (i + 1) * batch_size] for i in range(len(folder) // batch_size)]


def batch_steps(folder: ImageFolder, classes_per_batch: int, images_per_class: int, seed: int, epoch: int) -> Steps:
    """(1, n) per step: of so many different classes so many different pictures each.

    Classes are dealt like cards, all of them once before one comes again, and so are the pictures within a class;
    a class with fewer pictures gives all it has. An epoch has as many pictures as the folder, rounded down to whole
    batches, but at least one batch; in folders with unequal classes the pictures of small ones come more often.
    """
    random = np.random.default_rng([seed, epoch])
    n_classes = len(folder.class_names)
    class_ends = np.cumsum(np.bincount(folder.labels, minlength=n_classes))
    by_class = np.split(np.argsort(folder.labels, kind="stable"), class_ends[:-1])
    classes = _Dealer(np.arange(n_classes), random)
    pictures = [_Dealer(images, random) for images in by_class]
    classes_per_batch = min(classes_per_batch, n_classes)
    n_steps = max(1, len(folder) // (classes_per_batch * images_per_class))
    return [
        np.concatenate([pictures[label].deal(images_per_class) for label in classes.deal(classes_per_batch)])[None]
        for _ in range(n_steps)
    ]


class _Dealer:
    """Deals cards in random order, each once before any comes again, and never one twice in a hand."""

    def __init__(self, cards: npt.NDArray[np.int64], random: np.random.Generator) -> None:
        self._cards, self._random = cards, random
        self._stack = cards[:0]

    def deal(self, n: int) -> npt.NDArray[np.int64]:
        """(min(n, cards),) different cards."""
        n = min(n, len(self._cards))
        if len(self._stack) < n:
            shuffled = self._random.permutation(self._cards)
            held = np.isin(shuffled, self._stack)
            self._stack = np.concatenate([self._stack, shuffled[~held], shuffled[held]])
        hand, self._stack = self._stack[:n], self._stack[n:]
        return hand


class EpochSampler(Sampler[list[PictureKey]]):
    """The batches of an epoch, of each the columns that this process loads; drawn from seed and epoch alone.

    `epoch` and `first_step` say where the next iteration begins.
    """

    def __init__(self, steps_of_epoch: Callable[[int], Steps], processes: Processes) -> None:
        self._steps_of_epoch, self._processes = steps_of_epoch, processes
        self.epoch = 0
        self.first_step = 0
        steps = steps_of_epoch(0)
        self.steps_per_epoch = len(steps)
        self.images_per_epoch = sum(images.size for images in steps)
        self.smallest_step = min((images.shape[1] for images in steps), default=0)
        """Pairs or pictures."""

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[PictureKey]]:
        first = 0  # position of the batch's first picture in the epoch
        for step, images in enumerate(self._steps_of_epoch(self.epoch)):
            if step >= self.first_step:
                positions = first + np.arange(images.size).reshape(images.shape)
                mine = np.array_split(np.arange(images.shape[1]), self._processes.count)[self._processes.rank]
                yield [
                    PictureKey(self.epoch, *place)
                    for place in np.stack([positions[:, mine], images[:, mine]], axis=-1).reshape(-1, 2).tolist()
                ]
            first += images.size


Item = tuple[npt.NDArray[Any], int] | SkippedFile
"""Input and label of one picture, or why there is none."""


class AugmentedPictures(Dataset[Item]):
    def __init__(self, cache: PictureCache, preprocess: Preprocess, augmentation: Augmentation, seed: int) -> None:
        self.cache, self.preprocess, self.augmentation, self.seed = cache, preprocess, augmentation, seed

    def __getitem__(self, key: PictureKey) -> Item:
        folder = self.cache.folder
        try:
            picture = self.cache.picture(key.image)
        except ImageError as error:
            return SkippedFile(folder.paths[key.image], error.reason, error.code)
        # A sequence of seeds, as NumPy recommends for independent streams.
        random = np.random.default_rng([self.seed, key.epoch, key.position])
        return resize_image(self.augmentation(picture, random), self.preprocess.size_hw), int(folder.labels[key.image])


class EmbeddedPictures(Dataset[Item]):
    """Pictures that a frozen backbone has embedded."""

    def __init__(self, folder: ImageFolder, embeddings: ImageEmbeddings) -> None:
        self.folder, self.embeddings = folder, embeddings

    def __getitem__(self, key: PictureKey) -> Item:
        row = self.embeddings.row_of_image[key.image]
        if row < 0:
            return SkippedFile(self.folder.paths[key.image], "could not be embedded", code="unreadable")
        return self.embeddings.vectors[row], int(self.folder.labels[key.image])


def epoch_sampler(folder: ImageFolder, config: TrainConfig, processes: Processes) -> EpochSampler:
    def steps_of_epoch(epoch: int) -> Steps:
        if config.pairing == "reference":
            return reference_steps(folder, config.batch_size, config.seed, epoch)
        return batch_steps(folder, config.classes_per_batch, config.images_per_class, config.seed, epoch)

    return EpochSampler(steps_of_epoch, processes)


def training_batches(
    pictures: Dataset[Item], sampler: EpochSampler, config: TrainConfig, device: torch.device
) -> DataLoader[Batch]:
    """Iterates over the sampler's batches; workers are started at the first iteration and stay."""
    return DataLoader(
        pictures,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=partial(_collate, rows=2 if config.pairing == "reference" else 1),
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        # Forked, so that they share the decoded pictures' memory.
        multiprocessing_context=multiprocessing.get_context("fork") if config.workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        # An own generator: the loader draws from it at each start, and dropout's must not depend on how often that was.
        generator=torch.Generator(),
    )


def batches_of(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """One epoch; an error of a loading process ends all of them.

    They would outlive it: the error refers to the loader, and what multiprocessing sends them at the end, SIGTERM, they
    ignore, so the training process would wait for them for ever.
    """
    try:
        yield from loader
    except Exception:
        if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
            loader._iterator._shutdown_workers()
        raise


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C and `systemctl stop` reach the whole process group; the training process saves and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[Item], rows: int) -> Batch:
    """`rows` is 2 where the first half of the items are the left pictures and the second the right ones."""
    columns = list(
        zip(*(items[i * len(items) // rows : (i + 1) * len(items) // rows] for i in range(rows)), strict=True)
    )
    skipped = [item for item in items if isinstance(item, SkippedFile)]
    whole = [column for column in columns if not any(isinstance(item, SkippedFile) for item in column)]
    kept: list[Any] = [column[row] for row in range(rows) for column in whole]
    inputs = np.stack([item[0] for item in kept]) if kept else np.empty((0, 1, 1, 3), np.uint8)
    batch = Batch(torch.from_numpy(inputs), torch.tensor([item[1] for item in kept], dtype=torch.int64), skipped)
    if get_worker_info() is not None:
        # Here a full /dev/shm is an error that reaches the training process; in the loader's own thread the batch would
        # be lost without a word, and training would wait for it for ever.
        batch.inputs.share_memory_()  # type: ignore[no-untyped-call]
        batch.labels.share_memory_()  # type: ignore[no-untyped-call]
    return batch
