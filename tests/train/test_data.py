from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.preprocess import Preprocess, load_image
from siamese_train.augment import Augmentation, border_colour
from siamese_train.config import TrainConfig
from siamese_train.data import (
    AugmentedPictures,
    Batch,
    EpochSampler,
    batch_steps,
    epoch_sampler,
    reference_steps,
    training_batches,
)
from siamese_train.picture_cache import PictureCache
from siamese_train.processes import Processes

CPU = torch.device("cpu")
STILL = Augmentation(rotate=0, shift=0, scale=0, shear=0, flip=False)


def batches(
    root: Path,
    *,
    epoch: int = 0,
    cache_bytes: int = 0,
    augmentation: Augmentation | None = None,
    processes: Processes | None = None,
    **options: Any,
) -> list[Batch]:
    config = TrainConfig(root, root, Path("out"), **({"batch_size": 5} | options))
    folder = scan_image_folder(root)
    cache = PictureCache(folder, cache_bytes)
    cache.fill()
    pictures = AugmentedPictures(cache, Preprocess((24, 32)), augmentation or Augmentation(), config.seed)
    sampler = epoch_sampler(folder, config, processes or Processes(CPU))
    sampler.epoch = epoch
    return list(training_batches(pictures, sampler, config, CPU))


def pixels(found: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in found])


BOTH = pytest.mark.parametrize("pairing", ["reference", "batch"])
BATCH: dict[str, Any] = {"pairing": "batch", "classes_per_batch": 3, "images_per_class": 2}


def test_reference_batches_have_the_promised_shapes_and_the_short_one_is_dropped(pictures: Path) -> None:
    found = batches(pictures)
    assert len(found) == 3  # 16 pictures, 5 pairs a batch
    for batch in found:
        assert batch.inputs.shape == (10, 24, 32, 3)
        assert (batch.inputs.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
        assert batch.labels.shape == (10,)
        assert batch.skipped == []


def test_batches_of_classes_have_the_promised_shapes(pictures: Path) -> None:
    found = batches(pictures, **BATCH)
    assert len(found) == 2  # 16 pictures, 6 a batch
    for batch in found:
        assert batch.inputs.shape == (6, 24, 32, 3)
        assert torch.bincount(batch.labels).tolist().count(2) == 3
    assert len(batches(pictures, pairing="batch")) == 1  # fewer classes than asked: all of them


@BOTH
def test_the_same_at_any_number_of_workers_and_from_memory(pictures: Path, pairing: str) -> None:
    alone = pixels(batches(pictures, epoch=3, pairing=pairing))
    for workers in (1, 2):
        assert torch.equal(alone, pixels(batches(pictures, epoch=3, pairing=pairing, workers=workers)))
    some, all_of_them = 5 * 40 * 48 * 3, 2**20
    for cache_bytes, workers in ((some, 0), (all_of_them, 0), (all_of_them, 2)):
        found = batches(pictures, epoch=3, pairing=pairing, cache_bytes=cache_bytes, workers=workers)
        assert torch.equal(alone, pixels(found))


def test_decoded_pictures_stay_below_their_limit_and_are_not_read_again(pictures: Path) -> None:
    folder, one = scan_image_folder(pictures), 40 * 48 * 3
    for room, expected in ((0, 0), (one - 1, 0), (5 * one, 5), (5 * one + 1, 5), (100 * one, 16)):
        cache = PictureCache(folder, room)
        cache.fill()
        assert len(cache) == expected
    for file in pictures.rglob("*.png"):
        file.unlink()
    assert cache.picture(7).size == (40, 48)


@BOTH
def test_every_epoch_and_seed_has_its_own_list(pictures: Path, pairing: str) -> None:
    first = pixels(batches(pictures, pairing=pairing))
    assert not torch.equal(first, pixels(batches(pictures, epoch=1, pairing=pairing)))
    assert not torch.equal(first, pixels(batches(pictures, seed=2, pairing=pairing)))


@BOTH
def test_an_epoch_can_be_entered_anywhere(pictures: Path, pairing: str) -> None:
    config = TrainConfig(pictures, pictures, Path("out"), **({**BATCH, "pairing": pairing, "batch_size": 5}))
    sampler = epoch_sampler(scan_image_folder(pictures), config, Processes(CPU))
    lists = []
    for epoch in (0, 1):
        sampler.epoch = epoch
        lists.append([key.image for keys in sampler for key in keys])
        assert {key.epoch for keys in sampler for key in keys} == {epoch}
    assert lists[0] != lists[1]
    whole = list(sampler)
    assert len({key.position for keys in whole for key in keys}) == sum(map(len, whole))  # each its own augmentation
    sampler.first_step = 1
    assert list(sampler) == whole[1:]
    assert (len(sampler), sampler.steps_per_epoch) == (len(whole) - 1, len(whole))


@BOTH
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_every_batch_without_gap_or_overlap(pictures: Path, pairing: str, count: int) -> None:
    config = TrainConfig(pictures, pictures, Path("out"), **({**BATCH, "pairing": pairing, "batch_size": 7}))
    folder = scan_image_folder(pictures)
    rows = 2 if pairing == "reference" else 1

    def of(rank: int, count: int) -> list[np.ndarray]:
        sampler = epoch_sampler(folder, config, Processes(CPU, rank, count))
        return [np.array(keys)[:, 1:].reshape(rows, -1, 2) for keys in sampler]

    shares = zip(*(of(rank, count) for rank in range(count)), strict=True)
    for whole, parts in zip(of(0, 1), shares, strict=True):
        assert np.array_equal(np.concatenate(parts, axis=1), whole)


def folder_of(sizes: list[int]) -> ImageFolder:
    paths = tuple(f"{label:03}/{i}.png" for label, size in enumerate(sizes) for i in range(size))
    names = tuple(f"{label:03}" for label in range(len(sizes)))
    return ImageFolder(Path("root"), paths, np.repeat(np.arange(len(sizes)), sizes), names, ())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    classes=st.integers(2, 12),
    images=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_batches_of_classes_hold_for_all_folders(sizes: list[int], classes: int, images: int, seed: int) -> None:
    folder = folder_of(sizes)
    seen_of_class = np.zeros(len(sizes), int)
    per_picture = np.zeros(len(folder), int)
    n_classes = min(classes, len(sizes))
    steps = batch_steps(folder, classes, images, seed, epoch=0)
    assert len(steps) == max(1, len(folder) // (n_classes * images))
    for step in steps:
        assert len(set(step[0].tolist())) == step.shape[1]  # no picture twice, so none is ever paired with itself
        labels, counts = np.unique(folder.labels[step[0]], return_counts=True)
        assert len(labels) == n_classes
        assert all(count == min(images, sizes[label]) for label, count in zip(labels, counts, strict=True))
        seen_of_class[labels] += 1
        per_picture[step[0]] += 1
    assert seen_of_class.max() - seen_of_class.min() <= 1  # classes take turns
    for label in range(len(sizes)):
        of_class = per_picture[folder.labels == label]
        assert of_class.max() - of_class.min() <= 1  # and so do pictures within a class


def test_reference_steps_use_every_picture_once_as_the_left_one() -> None:
    steps = reference_steps(folder_of([5, 5, 6]), 4, seed=1, epoch=2)
    assert [step.shape for step in steps] == [(2, 4)] * 4
    assert sorted(np.concatenate([step[0] for step in steps]).tolist()) == list(range(16))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_cost_their_pairs_and_are_reported(pictures: Path, workers: int) -> None:
    (pictures / "cog/0.png").write_text("no picture")
    found = batches(pictures, batch_size=4, workers=workers, cache_bytes=2**20)
    skipped = [file for batch in found for file in batch.skipped]
    assert {file.path for file in skipped} == {"cog/0.png"}
    assert sum(len(batch.labels) for batch in found) == 2 * (16 - len(skipped))
    assert all(len(batch.inputs) == len(batch.labels) for batch in found)
    found = batches(pictures, pairing="batch", workers=workers)
    assert [len(batch.labels) for batch in found] == [15]
    assert [file.path for file in found[0].skipped] == ["cog/0.png"]


@BOTH
def test_a_batch_without_a_readable_picture_is_empty(pictures: Path, pairing: str) -> None:
    for file in pictures.rglob("*.png"):
        file.write_text("no picture")
    assert {len(batch.labels) for batch in batches(pictures, batch_size=8, pairing=pairing)} == {0}


def test_without_augmentation_training_sees_what_deployment_sees(pictures: Path) -> None:
    folder = scan_image_folder(pictures)
    deployed = {load_image(folder.absolute_path(i), Preprocess((24, 32))).tobytes() for i in range(len(folder))}
    found = pixels(batches(pictures, augmentation=STILL, cache_bytes=2**20))
    assert {image.numpy().tobytes() for image in found} <= deployed


def square() -> Image.Image:
    """White, with a red square right of the middle."""
    image = Image.new("RGB", (60, 60), (255, 255, 255))
    image.paste((255, 0, 0), (40, 25, 50, 35))
    return image


def red_pixels(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image).astype(int)
    return np.argwhere((levels[..., 0] == 255) & (levels[..., 1] == 0))


def test_augmentation_is_repeatable_and_keeps_size() -> None:
    augment = Augmentation()
    first = augment(square(), np.random.default_rng([1, 2, 3]))
    assert np.array_equal(first, augment(square(), np.random.default_rng([1, 2, 3])))
    assert not np.array_equal(first, augment(square(), np.random.default_rng([1, 2, 4])))
    assert first.size == (60, 60)


def test_augmentation_moves_turns_scales_and_mirrors_within_the_references_limits() -> None:
    centres, areas, black = [], [], 0
    for seed in range(400):
        changed = Augmentation()(square(), np.random.default_rng(seed))
        red = red_pixels(changed)
        black += bool((np.asarray(changed).sum(axis=2) == 0).any())
        if len(red):
            centres.append(red.mean(axis=0) - 29.5)
            areas.append(len(red))
    offsets = np.array(centres)  # (y, x) from the middle; the square's own is (0, 15)
    assert np.mean(offsets[:, 1] < 0) == pytest.approx(0.5, abs=0.1)  # mirrored half of the time
    # turned by at most 20 degrees, scaled by at most 1.2, moved by at most 12 pixels
    assert np.abs(offsets[:, 0]).max() <= 15 * 1.2 * np.sin(np.deg2rad(20)) + 12 + 1.5
    assert np.abs(offsets[:, 0]).max() > 12
    full = [area for area, centre in zip(areas, centres, strict=True) if np.abs(centre).max() < 20]
    assert max(full) <= 100 * 1.2**2 * 1.15
    assert min(full) <= 100 * 0.8**2 * 1.15
    assert black > 350  # what comes in at the border is black


def test_augmentation_switches() -> None:
    def moved(augment: Augmentation) -> list[float]:
        changed = [red_pixels(augment(square(), np.random.default_rng(seed))) for seed in range(100)]
        return [float(red.mean(axis=0)[1] - 29.5) for red in changed if len(red)]

    mild = TrainConfig(Path("train"), Path("val"), Path("out"), augment=0.2, no_flip=True)
    assert Augmentation.of(TrainConfig(Path("train"), Path("val"), Path("out"))) == Augmentation()
    assert Augmentation.of(replace(mild, augment=0)) == STILL
    assert np.array_equal(STILL(square(), np.random.default_rng(1)), square())
    assert set(moved(replace(STILL, flip=True))) == {15.0, -15.0}
    assert min(moved(Augmentation(flip=False))) > -5  # never mirrored
    assert np.std(moved(Augmentation.of(mild))) < np.std(moved(Augmentation(flip=False))) / 3


@pytest.mark.parametrize(("fill", "colour"), [("black", 0), ("white", 255), ("border", 200), ("10,20,30", 10)], ids=str)
def test_what_comes_in_at_the_border(fill: str, colour: int) -> None:
    image = Image.new("RGB", (50, 50), (200, 200, 200))
    image.paste((255, 0, 0), (10, 10, 40, 40))
    corners = set()
    for seed in range(20):
        changed = np.asarray(Augmentation(fill=fill)(image, np.random.default_rng(seed)))
        corners |= {int(changed[y, x, 0]) for y in (0, -1) for x in (0, -1)}
    assert colour in corners
    assert corners <= {colour, 200, 255}
    assert border_colour(image) == [200, 200, 200]


def test_a_sampler_of_no_steps_is_empty() -> None:
    sampler = EpochSampler(lambda epoch: reference_steps(folder_of([2, 2]), 8, 1, epoch), Processes(CPU))
    assert (len(sampler), list(sampler)) == (0, [])
