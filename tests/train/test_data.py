from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.preprocess import Preprocess, load_image
from siamese_train.augment import augment
from siamese_train.data import EpochSampler, PairBatch, training_batches


def batches(root: Path, *, epoch: int = 0, workers: int = 0, seed: int = 1, batch_size: int = 5) -> list[PairBatch]:
    sampler, loader = training_batches(
        scan_image_folder(root),
        Preprocess((24, 32)),
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        pin_memory=False,
    )
    sampler.epoch = epoch
    return list(loader)


def pixels(found: list[PairBatch]) -> torch.Tensor:
    return torch.cat([torch.cat([batch.left, batch.right]) for batch in found])


def test_batches_have_the_promised_shapes_and_the_short_one_is_dropped(pictures: Path) -> None:
    found = batches(pictures)
    assert len(found) == 3  # 16 pictures, 5 pairs a batch
    for batch in found:
        assert batch.left.shape == batch.right.shape == (5, 24, 32, 3)
        assert batch.left.dtype == torch.uint8
        assert batch.is_same.shape == (5, 1)
        assert set(batch.is_same.flatten().tolist()) <= {0.0, 1.0}
        assert batch.skipped == []


def test_the_same_at_any_number_of_workers(pictures: Path) -> None:
    alone = pixels(batches(pictures, epoch=3))
    assert torch.equal(alone, pixels(batches(pictures, epoch=3, workers=1)))
    assert torch.equal(alone, pixels(batches(pictures, epoch=3, workers=2)))


def test_every_epoch_and_seed_has_its_own_list(pictures: Path) -> None:
    first = pixels(batches(pictures))
    assert not torch.equal(first, pixels(batches(pictures, epoch=1)))
    assert not torch.equal(first, pixels(batches(pictures, seed=2)))


def test_the_pair_list_itself_is_new_each_epoch_and_can_be_entered_anywhere(pictures: Path) -> None:
    sampler = EpochSampler(scan_image_folder(pictures), 5, seed=1)
    lists = []
    for epoch in (0, 1):
        sampler.epoch = epoch
        lists.append([(key.left, key.right) for keys in sampler for key in keys])
        assert {key.epoch for keys in sampler for key in keys} == {epoch}
    assert lists[0] != lists[1]
    whole = list(sampler)
    sampler.first_step = 2
    assert list(sampler) == whole[2:]
    assert (len(sampler), sampler.steps_per_epoch) == (1, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_cost_their_pairs_and_are_reported(pictures: Path, workers: int) -> None:
    (pictures / "cog/0.png").write_text("no picture")
    found = batches(pictures, batch_size=4, workers=workers)
    skipped = [file for batch in found for file in batch.skipped]
    assert {file.path for file in skipped} == {"cog/0.png"}
    assert sum(len(batch.is_same) for batch in found) == 16 - len(skipped)
    assert all(len(batch.left) == len(batch.right) == len(batch.is_same) for batch in found)


def test_a_batch_without_a_readable_pair_is_empty(pictures: Path) -> None:
    for file in pictures.rglob("*.png"):
        file.write_text("no picture")
    assert [len(batch.is_same) for batch in batches(pictures, batch_size=8)] == [0, 0]


def test_without_augmentation_training_sees_what_deployment_sees(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siamese_train.data.augment", lambda image, random: image)
    folder = scan_image_folder(pictures)
    deployed = {load_image(folder.absolute_path(i), Preprocess((24, 32))).tobytes() for i in range(len(folder))}
    assert {image.numpy().tobytes() for image in pixels(batches(pictures))} <= deployed


def square() -> Image.Image:
    """White, with a red square right of the middle."""
    image = Image.new("RGB", (60, 60), (255, 255, 255))
    image.paste((255, 0, 0), (40, 25, 50, 35))
    return image


def test_augmentation_is_repeatable_and_keeps_size() -> None:
    first = augment(square(), np.random.default_rng([1, 2, 3]))
    assert np.array_equal(first, augment(square(), np.random.default_rng([1, 2, 3])))
    assert not np.array_equal(first, augment(square(), np.random.default_rng([1, 2, 4])))
    assert first.size == (60, 60)


def test_augmentation_moves_turns_scales_and_mirrors_within_the_references_limits() -> None:
    centres, areas, black = [], [], 0
    for seed in range(400):
        changed = np.asarray(augment(square(), np.random.default_rng(seed))).astype(int)
        red = (changed[..., 0] == 255) & (changed[..., 1] == 0)
        black += bool((changed.sum(axis=2) == 0).any())
        if red.any():
            centres.append(np.argwhere(red).mean(axis=0) - 29.5)
            areas.append(red.sum())
    offsets = np.array(centres)  # (y, x) from the middle; the square's own is (0, 15)
    assert np.mean(offsets[:, 1] < 0) == pytest.approx(0.5, abs=0.1)  # mirrored half of the time
    # turned by at most 20 degrees, scaled by at most 1.2, moved by at most 12 pixels
    assert np.abs(offsets[:, 0]).max() <= 15 * 1.2 * np.sin(np.deg2rad(20)) + 12 + 1.5
    assert np.abs(offsets[:, 0]).max() > 12
    full = [area for area, centre in zip(areas, centres, strict=True) if np.abs(centre).max() < 20]
    assert max(full) <= 100 * 1.2**2 * 1.15
    assert min(full) <= 100 * 0.8**2 * 1.15
    assert black > 350  # what comes in at the border is black
