from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.pairs import Pairs
from siamese_deploy.report_page.confusions import CONFUSED_CLASSES, Confusions, WorstPair


def folder_of(class_sizes: list[int]) -> ImageFolder:
    names = tuple(f"class{c:03d}" for c in range(len(class_sizes)))
    paths = tuple(f"{name}/{k}.png" for name, size in zip(names, class_sizes, strict=True) for k in range(size))
    return ImageFolder(Path("pictures"), paths, np.repeat(np.arange(len(class_sizes)), class_sizes), names)


def pairs_of(folder: ImageFolder, rows: list[tuple[int, int]]) -> Pairs:
    left, right = np.array(rows, np.int64).reshape(-1, 2).T
    return Pairs(left, right, folder.labels[left] == folder.labels[right])


def found(
    folder: ImageFolder, pairs: Pairs, scores: np.ndarray, threshold: float, chunk: int, worst: int
) -> Confusions:
    confusions = Confusions(folder, threshold, worst)
    for start in range(0, len(pairs), chunk):
        part = slice(start, start + chunk)
        confusions.add(Pairs(pairs.left[part], pairs.right[part], pairs.is_same[part]), scores[part])
    return confusions


FOLDER = folder_of([1, 2, 3, 4, 1])
N = len(FOLDER)
# Few distinct scores, so that ties are common; 0.4 is no float32.
scored = st.lists(
    st.tuples(st.integers(0, N - 1), st.integers(0, N - 1), st.integers(0, 5).map(lambda n: n / 5), st.booleans()),
    max_size=40,
)


@given(scored, st.sampled_from([0.0, 0.4, 0.5, 0.6, 1.0]), st.integers(1, 41), st.integers(0, 5))
def test_classes_and_worst_pairs_as_counted_one_by_one(
    rows: list[tuple[int, int, float, bool]], threshold: float, chunk: int, worst: int
) -> None:
    left, right = (np.array([row[side] for row in rows], np.int64) for side in (0, 1))
    scores = np.array([row[2] for row in rows], np.float32)
    pairs = Pairs(left, right, np.array([row[3] for row in rows], bool))  # a list may contradict the folders
    confusions = found(FOLDER, pairs, scores, threshold, chunk, worst)

    counts = {name: Counter[str]() for name in FOLDER.class_names}
    confused = {name: Counter[str]() for name in FOLDER.class_names}
    accepts, rejects = [], []
    for k, (a, b, same) in enumerate(zip(left.tolist(), right.tolist(), pairs.is_same.tolist(), strict=True)):
        accepted = float(scores[k]) >= threshold
        one, other = FOLDER.class_name(a), FOLDER.class_name(b)
        for name in {one, other}:
            counts[name]["same" if same else "different"] += 1
            counts[name]["wrong same" if same else "wrong different"] += accepted != same
        if accepted and not same:
            accepts.append(WorstPair(k, a, b, float(scores[k])))
            confused[one][other] += 1
            if one != other:
                confused[other][one] += 1
        if same and not accepted:
            rejects.append(WorstPair(k, a, b, float(scores[k])))
    assert confusions.worst_accepts == sorted(accepts, key=lambda pair: (-pair.score, pair.index))[:worst]
    assert confusions.worst_rejects == sorted(rejects, key=lambda pair: (pair.score, pair.index))[:worst]
    found_rows = {row.name: row for row in confusions.rows()}
    assert set(found_rows) == {name for name in counts if counts[name]}
    for name, row in found_rows.items():
        of = counts[name]
        assert (row.same_pairs, row.rejected) == (of["same"], of["wrong same"])
        assert (row.different_pairs, row.accepted) == (of["different"], of["wrong different"])
        assert row.images == FOLDER.labels.tolist().count(FOLDER.class_names.index(name))
        expected = sorted(confused[name].items(), key=lambda item: (-item[1], item[0]))[:CONFUSED_CLASSES]
        assert list(row.confused_with) == expected


def test_threshold_and_score_are_compared_as_float64() -> None:
    folder = folder_of([2, 1])
    pairs = pairs_of(folder, [(0, 1), (0, 2)])
    score = np.float32(0.385)  # a little less than the float64 of that name
    assert float(score) < 0.385
    confusions = found(folder, pairs, np.array([score, score]), 0.385, 2, 12)
    assert [pair.index for pair in confusions.worst_rejects] == [0]
    assert confusions.worst_accepts == []


def test_worst_first_weighs_both_kinds_of_mistake() -> None:
    folder = folder_of([3, 3, 2, 2])
    rows = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (6, 8), (7, 9)]
    # class000: 2 of 3 false rejects; class001: 1 of 3; class002 and class003: all false accepts, one each.
    scores = np.array([0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9], np.float32)
    names = [row.name for row in found(folder, pairs_of(folder, rows), scores, 0.5, 7, 12).rows()]
    assert names == ["class002", "class003", "class000", "class001"]


def test_a_class_without_a_pair_is_left_out_and_no_pairs_are_no_rows() -> None:
    folder = folder_of([2, 2])
    assert Confusions(folder, 0.5).rows() == []
    assert [
        row.name for row in found(folder, pairs_of(folder, [(0, 1)]), np.ones(1, np.float32), 0.5, 1, 1).rows()
    ] == ["class000"]


@pytest.mark.parametrize("threshold", [0.0, 0.999])
def test_every_pair_of_780_pictures_takes_less_than_300_ms(threshold: float) -> None:
    folder = folder_of([20] * 39)
    left, right = np.triu_indices(len(folder), 1)
    pairs = Pairs(left, right, folder.labels[left] == folder.labels[right])
    scores = np.random.RandomState(1).random_sample(len(pairs)).astype(np.float32)
    started = time.perf_counter()
    rows = found(folder, pairs, scores, threshold, 8192, 12).rows()
    assert time.perf_counter() - started < 0.3
    wrong = ~pairs.is_same & (scores >= threshold)
    assert sum(row.accepted for row in rows) == 2 * wrong.sum()
    low, high = folder.labels[pairs.left[wrong]], folder.labels[pairs.right[wrong]]
    table = np.zeros((39, 39), np.int64)
    np.add.at(table, (low, high), 1)
    table += table.T
    by_name = {row.name: row for row in rows}
    for c, name in enumerate(folder.class_names):
        top = np.argsort(-table[c], kind="stable")[:CONFUSED_CLASSES]
        expected = [(folder.class_names[k], int(table[c, k])) for k in top if table[c, k]]
        assert list(by_name[name].confused_with) == expected
