from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siamese_deploy.errors import InputDataError, UsageError
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.pairs import (
    EveryPair,
    PairList,
    Pairs,
    balanced_pairs,
    every_pair,
    one_shot_pairs,
    sample_pairs,
)


def folder_of(class_sizes: list[int]) -> ImageFolder:
    paths = [f"c{c:03}/{n:03}.png" for c, size in enumerate(class_sizes) for n in range(size)]
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    return ImageFolder(Path("/r"), tuple(paths), labels, tuple(f"c{c:03}" for c in range(len(class_sizes))))


def as_tuples(pairs: PairList) -> list[tuple[int, int, bool]]:
    return [
        row for c in pairs.chunks(7) for row in zip(c.left.tolist(), c.right.tolist(), c.is_same.tolist(), strict=True)
    ]


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_mixed_classes(folder: ImageFolder, data: st.DataObject) -> ImageFolder:
    """The classes of a list from a file may lie within each other."""
    return replace(folder, labels=np.array(data.draw(st.permutations(folder.labels.tolist()))))


pairable = st.lists(st.integers(1, 6), min_size=2, max_size=8).filter(lambda sizes: max(sizes) > 1).map(folder_of)


def test_golden_digest() -> None:
    """The promise "same folder, same seed, same list, for ever": this value never changes."""
    folder = folder_of([3, 1, 5, 2])
    pairs = sample_pairs(folder, seed=1)
    assert pairs.digest(folder) == "afcf0efce78137d0f082f22561afead2d56a823fa70e9404b64d2bfdc587cd69"
    assert sample_pairs(folder, seed=2).digest(folder) != pairs.digest(folder)
    shuffled = sample_pairs(folder, seed=(1, 7), shuffle=True)
    assert shuffled.digest(folder) == "e579947388b494a2b70a677844f5ee9a2af2f1f2e7e99a0ad576f299b7a5835f"
    balanced, sparse = balanced_pairs(folder, 20), balanced_pairs(folder, 5, seed=2)
    assert balanced.digest(folder) == "70ea1e75ff69bc28b546e9d6ceffd398250076ddafe112465906391c008c10dc"
    assert sparse.digest(folder) == "29ef4e1e27e72e760f058fe15c0c59e9e3351f6bad7f3622709dc1811847bf1f"
    assert (
        one_shot_pairs(folder, 3, 4).digest(folder)
        == "84dcb38809b135debac7a97f31348cf7fe1133ddfaad143d4449dcd9ff5b97aa"
    )
    assert every_pair(folder).digest(folder) == "79d8ecb9a3652d511a4245c8d52232f2052c64b06477d28695802c5379483884"


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
        "from siamese_deploy.pairs import *; folder = scan(sys.argv[1]);"
        "lists = sample_pairs(folder), every_pair(folder), balanced_pairs(folder, 9), one_shot_pairs(folder, 3, 5);"
        "print([pairs.digest(folder) for pairs in lists])"
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

    def digests() -> list[str]:
        lists = sample_pairs(folder), balanced_pairs(folder, 9), one_shot_pairs(folder, 3, 5)
        return [pairs.digest(folder) for pairs in lists]

    first = digests()
    after = np.random.random_sample()
    np.random.seed(3)
    assert np.random.random_sample() == after
    assert digests() == first


@pytest.mark.parametrize(("class_sizes", "words"), [([5], "one class only"), ([1, 1, 1], "one picture only")])
def test_refuses_folders_that_cannot_give_both_kinds(class_sizes: list[int], words: str) -> None:
    with pytest.raises(InputDataError, match=words):
        sample_pairs(folder_of(class_sizes))


def test_every_pair_is_there_once_and_none_with_itself() -> None:
    pairs = every_pair(folder_of([3, 2, 1]))
    found = as_tuples(pairs)
    assert [(left, right) for left, right, _ in found] == [(a, b) for a in range(6) for b in range(a + 1, 6)]
    assert sum(same for _, _, same in found) == pairs.same_pairs == 3 + 1


@given(st.data(), st.integers(1, 12), st.integers(1, 80))
def test_every_pair_is_what_the_list_of_them_would_be(data: st.DataObject, n: int, size: int) -> None:
    labels = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    folder = ImageFolder(Path("/r"), tuple(f"{k:02}" for k in range(n)), labels, ("a", "b", "c", "d"))
    left, right = np.triu_indices(n, 1)
    listed = Pairs(left, right, labels[left] == labels[right])
    for computed, expected in [
        (every_pair(folder), listed),
        (every_pair(folder).among(usable), listed.among(usable)),
        (every_pair(folder).among(usable).among(~usable), listed.where(np.zeros(len(listed), bool))),
    ]:
        assert (len(computed), computed.same_pairs) == (len(expected), expected.same_pairs)
        assert computed.unique_images().tolist() == expected.unique_images().tolist()
        assert as_tuples(computed) == as_tuples(computed.listed()) == as_tuples(expected)
        assert computed.digest(folder) == computed.listed().digest(folder) == expected.digest(folder)
        assert computed.is_same.tolist() == expected.is_same.tolist()
        numbers = np.arange(len(expected))[::-3]
        assert as_tuples(computed.take(numbers)) == as_tuples(expected)[::-3]
        chunks = list(computed.chunks(size))
        assert all(len(chunk) == size for chunk in chunks[:-1])
        assert sum(len(chunk) for chunk in chunks) == len(expected)


def test_a_long_list_is_the_same_one_and_its_digest_as_defined() -> None:
    folder = folder_of([40] * 10)
    pairs = every_pair(folder)
    listed = pairs.listed()
    left, right = np.triu_indices(400, 1)
    assert (listed.left == left).all()
    assert (listed.right == right).all()
    assert (listed.is_same == (folder.labels[left] == folder.labels[right])).all()
    names = [path.encode() + b"\0" for path in folder.paths]
    text = b"".join(names[a] + names[b] + (b"1\0" if same else b"0\0") for a, b, same in as_tuples(listed))
    assert pairs.digest(folder) == hashlib.sha256(text).hexdigest()


def test_every_pair_takes_the_memory_of_a_chunk() -> None:
    pairs = every_pair(folder_of([4] * 5000))
    assert len(pairs) == 199_990_000
    assert peak_bytes(lambda: [len(chunk) for chunk in islice(pairs.chunks(8192), 20)]) < 4e6


def test_more_pairs_than_memory_are_refused_only_as_a_list() -> None:
    pictures = np.broadcast_to(np.int64(0), 10**7)
    pairs = EveryPair(pictures, pictures)
    assert len(pairs) == 49_999_995_000_000
    with pytest.raises(InputDataError, match="the pairs of 10,000,000 pictures do not fit into memory"):
        pairs.listed()


def test_where_keeps_order_and_changes_the_digest() -> None:
    folder = folder_of([3, 3])
    pairs = sample_pairs(folder)
    kept = pairs.where(np.array([True, False, True, True, False, True]))
    assert len(kept) == 4
    assert kept.left.tolist() == [0, 2, 3, 5]
    assert kept.digest(folder) != pairs.digest(folder)


def test_folds_and_episodes_stay_with_their_pairs() -> None:
    folder = folder_of([2, 2, 2])
    pairs = one_shot_pairs(folder, 3, 4)
    keep = np.ones(12, bool)
    keep[4] = False  # a pair of the second episode
    kept = pairs.where(keep)
    assert kept.ways == 3
    assert as_tuples(kept) == as_tuples(pairs)[:3] + as_tuples(pairs)[6:]
    usable = np.arange(len(folder)) != pairs.right[7]
    assert (kept.among(usable).left.reshape(-1, 3) == kept.among(usable).left[::3, np.newaxis]).all()
    assert len(kept.among(usable)) < len(kept)
    folded = Pairs(pairs.left, pairs.right, pairs.is_same, np.arange(12) // 6)
    assert folded.where(keep).fold is not None
    assert folded.where(keep).fold.tolist() == [0] * 5 + [1] * 6
    assert [chunk.fold.tolist() for chunk in folded.chunks(5)] == [[0] * 5, [0] + [1] * 4, [1] * 2]
    assert {chunk.ways for chunk in pairs.chunks(5)} == {0}


@given(pairable, st.data(), st.integers(0, 2**32 - 1))
def test_balanced_pairs_are_distinct_and_half_of_them_same(folder: ImageFolder, data: st.DataObject, seed: int) -> None:
    folder = with_mixed_classes(folder, data)
    every = every_pair(folder)
    most = 2 * min(every.same_pairs, len(every) - every.same_pairs)
    n = data.draw(st.integers(2, most))
    pairs = balanced_pairs(folder, n, seed)
    assert len({(a, b) for a, b, _ in as_tuples(pairs)}) == len(pairs) == n
    assert set(as_tuples(pairs)) <= set(as_tuples(every))
    assert pairs.same_pairs == n // 2


@pytest.mark.parametrize(("class_sizes", "n"), [([3, 2, 3], 6), ([9, 8, 9], 6)])  # most of the pairs, few of them
def test_balanced_pairs_are_drawn_evenly_and_in_random_order(class_sizes: list[int], n: int) -> None:
    folder = folder_of(class_sizes)
    every = {pair: k for k, pair in enumerate(as_tuples(every_pair(folder)))}
    counts = np.zeros((n, len(every)))
    rounds = 1500
    for seed in range(rounds):
        for place, pair in enumerate(as_tuples(balanced_pairs(folder, n, seed))):
            counts[place, every[pair]] += 1
    same = np.array([is_same for _, _, is_same in every])
    for kind in (same, ~same):
        expected = rounds * (n / 2) / kind.sum()
        assert abs(counts[:, kind].sum(axis=0) - expected).max() < 5 * np.sqrt(expected)
    assert counts[:, same].sum(axis=1) / rounds == pytest.approx(0.5, abs=0.07)


def test_balanced_pairs_take_the_memory_of_the_list() -> None:
    folder = folder_of([100] * 50)  # 12,497,500 pairs
    assert peak_bytes(lambda: balanced_pairs(folder, 1000)) < 2e6


@pytest.mark.parametrize(
    ("class_sizes", "n", "words"),
    [
        ([3, 2], 10, r"/r: 10 pairs need 5 of the same class, but there are 4; ask for fewer"),
        ([10, 1], 40, r"40 pairs need 20 of different classes, but there are 10"),
        ([1, 1, 1], 2, "need 1 of the same class, but there are 0"),
        ([5], 2, "need 1 of different classes, but there are 0"),
    ],
)
def test_balanced_pairs_that_the_folder_has_not(class_sizes: list[int], n: int, words: str) -> None:
    with pytest.raises(InputDataError, match=words):
        balanced_pairs(folder_of(class_sizes), n)
    with pytest.raises(UsageError, match="at least 2"):
        balanced_pairs(folder_of(class_sizes), 1)


@given(pairable, st.data(), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_episode_asks_for_one_of_its_classes(
    folder: ImageFolder, data: st.DataObject, episodes: int, seed: int
) -> None:
    folder = with_mixed_classes(folder, data)
    ways = data.draw(st.integers(2, len(folder.class_names)))
    pairs = one_shot_pairs(folder, ways, episodes, seed)
    assert (len(pairs), pairs.ways, pairs.same_pairs) == (ways * episodes, ways, episodes)
    assert (pairs.is_same == (folder.labels[pairs.left] == folder.labels[pairs.right])).all()
    assert (pairs.left != pairs.right).all()
    for episode in range(episodes):
        part = slice(episode * ways, (episode + 1) * ways)
        assert len(set(pairs.left[part].tolist())) == 1
        assert len(set(folder.labels[pairs.right[part]].tolist())) == ways
        assert pairs.is_same[part].sum() == 1
    longer = one_shot_pairs(folder, ways, episodes + 3, seed)
    assert as_tuples(longer)[: len(pairs)] == as_tuples(pairs)


def test_episodes_are_drawn_evenly() -> None:
    folder = folder_of([2, 4, 1, 3])
    pairs = one_shot_pairs(folder, 3, 20_000)
    query, support = pairs.left[::3], pairs.right.reshape(-1, 3)
    by_class = np.bincount(folder.labels[query], minlength=4) / len(query)
    assert by_class == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.02)  # among those with two pictures
    assert np.bincount(query)[2:6] / len(query) == pytest.approx(1 / 12, abs=0.01)
    own = pairs.right[pairs.is_same]
    assert np.bincount(own[query == 3], minlength=6)[2:6] / (query == 3).sum() == pytest.approx(
        [1 / 3, 0, 1 / 3, 1 / 3], abs=0.05
    )
    assert pairs.is_same.reshape(-1, 3).mean(axis=0) == pytest.approx(1 / 3, abs=0.02)
    others = folder.labels[support[folder.labels[query] == 0]]
    assert [(others == c).any(axis=1).mean() for c in (1, 2, 3)] == pytest.approx([2 / 3] * 3, abs=0.03)


@pytest.mark.parametrize(
    ("class_sizes", "words"),
    [([2, 1], "/r: 3-way episodes need 3 classes, but there are 2"), ([1, 1, 1], "one picture only")],
)
def test_refuses_folders_without_episodes(class_sizes: list[int], words: str) -> None:
    with pytest.raises(InputDataError, match=words):
        one_shot_pairs(folder_of(class_sizes), 3, 5)
    for ways, episodes in ((1, 5), (3, 0)):
        with pytest.raises(UsageError, match="at least 2 ways and 1 episode"):
            one_shot_pairs(folder_of([2, 2, 2]), ways, episodes)
