from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.pairs import every_pair, sample_pairs


def folder_of(class_sizes: list[int]) -> ImageFolder:
    paths = [f"c{c:03}/{n:03}.png" for c, size in enumerate(class_sizes) for n in range(size)]
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    return ImageFolder(Path("/r"), tuple(paths), labels, tuple(f"c{c:03}" for c in range(len(class_sizes))))


pairable = st.lists(st.integers(1, 6), min_size=2, max_size=8).filter(lambda sizes: max(sizes) > 1).map(folder_of)


def test_golden_digest() -> None:
    """The promise "same folder, same seed, same list, for ever": this value never changes."""
    folder = folder_of([3, 1, 5, 2])
    pairs = sample_pairs(folder, seed=1)
    assert pairs.digest(folder) == "afcf0efce78137d0f082f22561afead2d56a823fa70e9404b64d2bfdc587cd69"
    assert sample_pairs(folder, seed=2).digest(folder) != pairs.digest(folder)
    shuffled = sample_pairs(folder, seed=(1, 7), shuffle=True)
    assert shuffled.digest(folder) == "e579947388b494a2b70a677844f5ee9a2af2f1f2e7e99a0ad576f299b7a5835f"


@given(pairable, st.integers(0, 2**32 - 1), st.booleans())
def test_every_picture_once_on_the_left_never_with_itself(folder: ImageFolder, seed: int, shuffle: bool) -> None:
    pairs = sample_pairs(folder, seed, shuffle=shuffle)
    assert sorted(pairs.left.tolist()) == list(range(len(folder)))
    assert shuffle or pairs.left.tolist() == list(range(len(folder)))
    assert (pairs.left != pairs.right).all()
    assert ((folder.labels[pairs.left] == folder.labels[pairs.right]) == pairs.is_same).all()
    assert pairs.unique_images().tolist() == list(range(len(folder)))


def test_partner_is_drawn_by_coin_then_class_then_picture() -> None:
    folder = folder_of([10, 200, 1, 10])
    counts = np.zeros(len(folder))
    same = 0
    rounds = 600
    for seed in range(rounds):
        pairs = sample_pairs(folder, seed)
        same += int(pairs.is_same[:10].sum())
        counts += np.bincount(pairs.right[:10][~pairs.is_same[:10]], minlength=len(folder))
        assert not pairs.is_same[210]  # alone in its class
    assert same / (10 * rounds) == pytest.approx(0.5, abs=0.03)
    by_class = [counts[:10].sum(), counts[10:210].sum(), counts[210], counts[211:].sum()]
    # uniform over the three other classes, however many pictures they have
    assert by_class[0] == 0
    assert np.array(by_class[1:]) / sum(by_class) == pytest.approx(1 / 3, abs=0.04)
    assert counts[211:].min() > 0


def test_same_list_for_hash_seeds_mount_points_and_creation_order(pictures: Path, tmp_path: Path) -> None:
    moved = tmp_path / "another" / "mount"
    for file in sorted(pictures.rglob("*.png"), reverse=True):
        (moved / file.parent.name).mkdir(parents=True, exist_ok=True)
        (moved / file.parent.name / file.name).write_bytes(file.read_bytes())
    code = (
        "import sys; from siamese_deploy.image_folder import scan_image_folder as scan;"
        "from siamese_deploy.pairs import sample_pairs;"
        "folder = scan(sys.argv[1]); print(sample_pairs(folder, 1).digest(folder))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(root)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for root in (pictures, moved)
        for hash_seed in ("0", "1", "2")
    }
    assert len(digests) == 1


def test_global_random_state_is_neither_used_nor_changed(pictures: Path) -> None:
    folder = scan_image_folder(pictures)
    np.random.seed(3)
    first = sample_pairs(folder).digest(folder)
    after = np.random.random_sample()
    np.random.seed(3)
    assert np.random.random_sample() == after
    assert sample_pairs(folder).digest(folder) == first


@pytest.mark.parametrize(("class_sizes", "words"), [([5], "one class only"), ([1, 1, 1], "one picture only")])
def test_refuses_folders_that_cannot_give_both_kinds(class_sizes: list[int], words: str) -> None:
    with pytest.raises(InputDataError, match=words):
        sample_pairs(folder_of(class_sizes))


def test_every_pair_is_there_once_and_none_with_itself() -> None:
    pairs = every_pair(folder_of([3, 2, 1]))
    found = sorted(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))
    assert found == [(a, b) for a in range(6) for b in range(a + 1, 6)]
    assert int(pairs.is_same.sum()) == 3 + 1


def test_where_keeps_order_and_changes_the_digest() -> None:
    folder = folder_of([3, 3])
    pairs = sample_pairs(folder)
    kept = pairs.where(np.array([True, False, True, True, False, True]))
    assert len(kept) == 4
    assert kept.left.tolist() == [0, 2, 3, 5]
    assert kept.digest(folder) != pairs.digest(folder)
