"""ImageFolder + seed -> Pairs. No files, no global random state.

"Deterministic" means: the same folder gives the same list on every machine, Python, NumPy and hash seed. Hence only
`RandomState.random_sample` is drawn from (its stream is frozen by NumPy's compatibility policy, and 53-bit fractions
do not depend on the platform's integer width), and everything else is arithmetic on sorted arrays.

    sample_pairs      the reference's: every picture once on the left, half of the partners of its class
    every_pair        all unordered pairs, computed and never stored
    balanced_pairs    so many distinct pairs, half of them same
    one_shot_pairs    episodes: one query against one picture of each of `ways` classes
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import InputDataError, UsageError
from siamese_deploy.image_folder import ImageFolder

Integers: TypeAlias = npt.NDArray[np.int64]
_CHUNK_PAIRS = 2**16


@dataclass(frozen=True)
class Pairs:
    """A list of pairs; see `EveryPair` for the list that is computed instead."""

    left: Integers
    """(n_pairs,) index into ImageFolder.paths."""
    right: Integers
    """(n_pairs,) index into ImageFolder.paths."""
    is_same: npt.NDArray[np.bool_]
    """(n_pairs,) True where both pictures are of one class; in a list from a file, where it says so."""
    fold: Integers | None = None
    """(n_pairs,) fold of each pair of a pairs.txt list, from 0; None: a list without folds."""
    ways: int = 0
    """Above 0: each `ways` pairs in a row are one episode, with its query on the left; 0: single pairs."""

    def __len__(self) -> int:
        return len(self.left)

    @property
    def same_pairs(self) -> int:
        return int(self.is_same.sum())

    def unique_images(self) -> Integers:
        """(n_images,) sorted indices of the pictures that occur in at least one pair."""
        return np.unique(np.concatenate([self.left, self.right]))

    def where(self, keep: npt.NDArray[np.bool_]) -> Pairs:
        """The pairs at which `keep` (n_pairs,) is True, in the same order; of episodes, those kept as a whole."""
        if self.ways:
            keep = np.repeat(keep.reshape(-1, self.ways).all(axis=1), self.ways)
        fold = None if self.fold is None else self.fold[keep]
        return Pairs(self.left[keep], self.right[keep], self.is_same[keep], fold, self.ways)

    def among(self, usable: npt.NDArray[np.bool_]) -> Pairs:
        """The pairs of two pictures that are `usable` (n_images,), in the same order."""
        return self.where(usable[self.left] & usable[self.right])

    def chunks(self, size: int) -> Iterator[Pairs]:
        """The pairs in order, at most `size` at a time; without `ways`, for a chunk may end inside an episode."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            fold = None if self.fold is None else self.fold[part]
            yield Pairs(self.left[part], self.right[part], self.is_same[part], fold)

    def take(self, numbers: Integers) -> Pairs:
        """The pairs with these numbers (n,), which count from 0."""
        return Pairs(self.left[numbers], self.right[numbers], self.is_same[numbers])

    def digest(self, folder: ImageFolder) -> str:
        """SHA-256 (hex) of the list: for each pair the two relative paths and 0 or 1, each ended by a zero byte."""
        return _digest(self, folder)


@dataclass(frozen=True)
class EveryPair:
    """Every unordered pair of two of the `images`: (0, 1), (0, 2), ... (1, 2), ...; computed, never stored."""

    labels: Integers
    """(n_images,) class of each picture of the folder."""
    images: Integers
    """(n_usable,) sorted indices into ImageFolder.paths."""
    ways: ClassVar[int] = 0

    def __len__(self) -> int:
        return len(self.images) * (len(self.images) - 1) // 2

    @property
    def same_pairs(self) -> int:
        sizes = np.bincount(self.labels[self.images])
        return int((sizes * (sizes - 1) // 2).sum())

    def unique_images(self) -> Integers:
        """(n_images,) sorted indices of the pictures that occur in at least one pair."""
        return self.images if len(self.images) > 1 else self.images[:0]

    def among(self, usable: npt.NDArray[np.bool_]) -> EveryPair:
        """The pairs of two pictures that are `usable` (n_images,), in the same order."""
        return EveryPair(self.labels, self.images[usable[self.images]])

    def chunks(self, size: int) -> Iterator[Pairs]:
        """The pairs in order, at most `size` at a time; memory grows with the chunk and the pictures only."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def take(self, numbers: Integers) -> Pairs:
        """The pairs with these numbers (n,), which count from 0."""
        left, right = (self.images[position] for position in self._rows.at(numbers))
        return Pairs(left, right, self.labels[left] == self.labels[right])

    @cached_property
    def _rows(self) -> _Rows:
        position = np.arange(len(self.images))
        return _Rows(position + 1, np.full(len(position), len(position)))

    @property
    def is_same(self) -> npt.NDArray[np.bool_]:
        """(n_pairs,) True where both pictures are of one class; computed at each call, one byte a pair."""
        return np.concatenate([chunk.is_same for chunk in self.chunks(_CHUNK_PAIRS)] or [np.empty(0, np.bool_)])

    def listed(self) -> Pairs:
        """The same pairs as arrays, 17 bytes each.

        Raises:
            InputDataError: they do not fit into memory.
        """
        try:
            left, right = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
            is_same = np.empty(len(self), np.bool_)
        except MemoryError as error:
            raise InputDataError(
                f"the pairs of {len(self.images):,} pictures do not fit into memory; use fewer pictures",
                code="out-of-memory",
            ) from error
        for k, chunk in enumerate(self.chunks(_CHUNK_PAIRS)):
            part = slice(k * _CHUNK_PAIRS, (k + 1) * _CHUNK_PAIRS)
            left[part], right[part], is_same[part] = chunk.left, chunk.right, chunk.is_same
        return Pairs(left, right, is_same)

    def digest(self, folder: ImageFolder) -> str:
        """As `Pairs.digest`; equal to that of the same pairs as a list."""
        return _digest(self, folder)


PairList: TypeAlias = Pairs | EveryPair


def sample_pairs(folder: ImageFolder, seed: int | Sequence[int] = 1, *, shuffle: bool = False) -> Pairs:
    """The reference scheme: every picture once as the left one, its partner of the same class with probability 0.5.

    The partner is never the picture itself. A partner of another class is drawn by class first (uniformly), then by
    picture (uniformly). A picture that is alone in its class always gets a partner of another class.

    Args:
        seed: one number, or several (such as seed and epoch), each in [0, 2**32).
        shuffle: also draw the order of the left pictures (training); otherwise it is the folder's order.

    Returns:
        n_images pairs.

    Raises:
        InputDataError: fewer than two classes, or no class with two pictures.
    """
    n_images, n_classes = len(folder), len(folder.class_names)
    if n_classes < 2:
        raise InputDataError(
            f"{folder.root}: one class only ({folder.class_names[0]}), so no pairs of different classes can be formed; "
            "expected at least two class folders",
            code="one-class",
        )
    class_sizes, class_start, by_class = _grouped(folder)
    _refuse_classes_of_one(folder, class_sizes)
    rank_in_class = np.empty(n_images, dtype=np.int64)
    rank_in_class[by_class] = np.arange(n_images) - class_start[folder.labels[by_class]]

    random = np.random.RandomState(seed)
    draw_same, draw_class, draw_picture = random.random_sample((n_images, 3)).T
    left = np.argsort(random.random_sample(n_images), kind="stable") if shuffle else np.arange(n_images)
    label = folder.labels[left]

    is_same = (draw_same < 0.5) & (class_sizes[label] > 1)
    # Draw among all but one, then step over the one: never the own class, never the picture itself.
    other_class = (draw_class * (n_classes - 1)).astype(np.int64)
    other_class += other_class >= label
    partner_class = np.where(is_same, label, other_class)
    rank = (draw_picture * (class_sizes[partner_class] - is_same)).astype(np.int64)
    rank += is_same & (rank >= rank_in_class[left])
    right = by_class[class_start[partner_class] + rank]
    return Pairs(left.astype(np.int64), right.astype(np.int64), is_same)


def every_pair(folder: ImageFolder) -> EveryPair:
    """Every unordered pair of two pictures of the folder: n (n - 1) / 2 of them."""
    return EveryPair(folder.labels, np.arange(len(folder)))


def balanced_pairs(folder: ImageFolder, n: int, seed: int = 1) -> Pairs:
    """`n` distinct unordered pairs in random order, n // 2 of them same; every pair of a kind is equally likely.

    Time and memory grow with `n` and the number of pictures, not with the number of pairs the folder has.

    Args:
        seed: in [0, 2**32).

    Raises:
        UsageError: `n` is below 2.
        InputDataError: the folder has fewer pairs of a kind.
    """
    if n < 2:
        raise UsageError(f"number of pairs: expected at least 2, one of each kind, got {n}")
    _, class_start, by_class = _grouped(folder)
    position, class_end = np.arange(len(folder)), class_start[folder.labels[by_class] + 1]
    same = _Rows(position + 1, class_end)
    different = _Rows(class_end, np.full(len(folder), len(folder)))
    random = np.random.RandomState(seed)
    parts = []
    for kind, rows, wanted in (("the same class", same, n // 2), ("different classes", different, n - n // 2)):
        if rows.total < wanted:
            raise InputDataError(
                f"{folder.root}: {n:,} pairs need {wanted:,} of {kind}, but there are {rows.total:,}; ask for fewer "
                "pairs or add pictures",
                code="too-few-pairs",
            )
        parts.append(rows.at(_distinct(random, wanted, rows.total)))
    left, right = (by_class[np.concatenate(side)] for side in zip(*parts, strict=True))
    is_same = np.arange(n) < n // 2
    order = np.argsort(random.random_sample(n), kind="stable")
    return Pairs(np.minimum(left, right)[order], np.maximum(left, right)[order], is_same[order])


def one_shot_pairs(folder: ImageFolder, ways: int = 20, episodes: int = 400, seed: int = 1) -> Pairs:
    """Episodes of one-shot classification: which of `ways` pictures, one a class, is of the class of the query?

    After Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction",
    Science 350 (2015), with the classes of an episode drawn from all of the folder, as Vinyals et al., "Matching
    networks for one shot learning", NIPS 2016, draw them. The query's class is drawn among those with two pictures,
    then the query, then another picture of its class; then ways - 1 other classes, each different, and a picture of
    each. The order of the pictures within an episode is drawn as well. An episode does not depend on how many follow.

    Args:
        seed: in [0, 2**32).

    Returns:
        episodes * ways pairs: the query on the left, one of the pictures on the right, one of them the same class.

    Raises:
        UsageError: `ways` is below 2 or `episodes` below 1.
        InputDataError: fewer classes than `ways`, or no class with two pictures.
    """
    if ways < 2 or episodes < 1:
        raise UsageError(f"one-shot: expected at least 2 ways and 1 episode, got {ways} and {episodes}")
    n_classes = len(folder.class_names)
    if n_classes < ways:
        raise InputDataError(
            f"{folder.root}: {ways}-way episodes need {ways} classes, but there are {n_classes}; ask for fewer ways",
            code="one-class",
        )
    class_sizes, class_start, by_class = _grouped(folder)
    _refuse_classes_of_one(folder, class_sizes)
    with_two = np.flatnonzero(class_sizes > 1)

    draws = np.random.RandomState(seed).random_sample((episodes, 3 * ways + 1))  # a row an episode
    draw_class, draw_query, draw_own = draws[:, :3].T
    draw_other_class, draw_other, draw_order = (
        draws[:, 3 : ways + 2],
        draws[:, ways + 2 : 2 * ways + 1],
        draws[:, -ways:],
    )

    own_class = with_two[(draw_class * len(with_two)).astype(np.int64)]
    query = (draw_query * class_sizes[own_class]).astype(np.int64)
    own = (draw_own * (class_sizes[own_class] - 1)).astype(np.int64)
    own += own >= query  # drawn among all but the query: step over it
    other_class = _distinct_in_each_row(draw_other_class, n_classes - 1)
    other_class += other_class >= own_class[:, np.newaxis]
    other = (draw_other * class_sizes[other_class]).astype(np.int64)

    support = np.column_stack([class_start[own_class] + own, class_start[other_class] + other])
    order = np.argsort(draw_order, axis=1, kind="stable")
    left = np.repeat(by_class[class_start[own_class] + query], ways)
    right = by_class[np.take_along_axis(support, order, axis=1)]
    return Pairs(left, right.ravel(), (order == 0).ravel(), ways=ways)


def _grouped(folder: ImageFolder) -> tuple[Integers, Integers, Integers]:
    """Sizes (n_classes,), start (n_classes + 1,), by_class: class c has pictures by_class[start[c] : start[c + 1]]."""
    sizes = np.bincount(folder.labels, minlength=len(folder.class_names))
    return sizes, np.concatenate([[0], np.cumsum(sizes)]), np.argsort(folder.labels, kind="stable")


def _refuse_classes_of_one(folder: ImageFolder, class_sizes: Integers) -> None:
    if class_sizes.max() < 2:
        raise InputDataError(
            f"{folder.root}: each of the {len(class_sizes)} classes has one picture only, so no pairs of the same "
            "class can be formed; expected at least one class with two pictures",
            code="no-class-of-two",
        )


class _Rows:
    """Position p is paired with each of the positions first[p] to end[p] - 1; the pairs are numbered row by row."""

    def __init__(self, first: Integers, end: Integers) -> None:
        self.after = np.cumsum(end - first)
        """(n_positions,) number of the first pair behind each row."""
        self.offset = end - self.after
        self.total = int(self.after[-1]) if len(first) else 0

    def at(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Both positions of the pairs with these numbers."""
        row = np.searchsorted(self.after, numbers, side="right")
        return row, self.offset[row] + numbers


def _digest(pairs: PairList, folder: ImageFolder) -> str:
    names = [os.fsencode(path) + b"\0" for path in folder.paths]
    ends = [name + b"0\0" for name in names] + [name + b"1\0" for name in names]
    digest = hashlib.sha256()
    for chunk in pairs.chunks(_CHUNK_PAIRS):
        left = map(names.__getitem__, chunk.left.tolist())
        right = map(ends.__getitem__, (chunk.right + len(names) * chunk.is_same).tolist())
        digest.update(b"".join(chain.from_iterable(zip(left, right, strict=True))))
    return digest.hexdigest()


def _distinct(random: np.random.RandomState, n: int, total: int) -> Integers:
    """(n,) different numbers in [0, total); every set of them is equally likely, their order is not."""
    if total <= 4 * n:
        return np.argsort(random.random_sample(total), kind="stable")[:n]
    chosen = np.empty(0, dtype=np.int64)
    while len(chosen) < n:  # a number that came before is drawn again; at most one in four
        drawn = (random.random_sample(n - len(chosen)) * total).astype(np.int64)
        chosen = np.unique(np.concatenate([chosen, drawn]))
    return chosen


def _distinct_in_each_row(draws: npt.NDArray[np.float64], total: int) -> Integers:
    """(n_rows, n) numbers in [0, total), different within a row, from `draws` (n_rows, n) in [0, 1).

    Robert Floyd's algorithm (Bentley, "Programming pearls", CACM 30 (1987) 754): every set is equally likely (its
    order is not), and memory does not grow with `total`.
    """
    n_rows, n = draws.shape
    chosen = np.empty((n_rows, n), dtype=np.int64)
    for k, last in enumerate(range(total - n, total)):
        number = (draws[:, k] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :k] == number[:, np.newaxis]).any(axis=1)
        chosen[:, k] = np.where(taken, last, number)
    return chosen
