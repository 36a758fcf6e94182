"""Scored pairs, chunk by chunk -> which classes are mistaken for which, and the worst mistakes.

Memory is bounded by the classes and by the pairs of classes that are confused, not by the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.metrics.decisions import accepted
from siamese_deploy.pairs import Pairs
from siamese_deploy.verifier import Scores

CONFUSED_CLASSES = 5
"""So many are named for each class; enough to find the five most confused pairs of classes of all."""
_MERGE_FROM = 1 << 16


@dataclass(frozen=True)
class ClassRow:
    """What happened to the pairs with a picture of one class; a pair of two classes counts for both."""

    name: str
    images: int
    same_pairs: int
    rejected: int
    """Same pairs that were rejected (false rejects)."""
    different_pairs: int
    accepted: int
    """Different pairs that were accepted (false accepts)."""
    confused_with: tuple[tuple[str, int], ...]
    """The classes of the other pictures of `accepted`, and how often; most first, CONFUSED_CLASSES at most."""


@dataclass(frozen=True)
class WorstPair:
    index: int
    """Of the pair in the order in which pairs were added, from 0: its row in pairs.csv."""
    left: int
    """Index into ImageFolder.paths."""
    right: int
    """Index into ImageFolder.paths."""
    score: float


class Confusions:
    """Decides pairs at a threshold and remembers the mistakes.

    Args:
        worst: how many of the worst false accepts, and of the worst false rejects, are kept.
    """

    def __init__(self, folder: ImageFolder, threshold: float, worst: int = 12) -> None:
        n = len(folder.class_names)
        self._folder, self._threshold, self._kept = folder, threshold, worst
        self._n_added = self._false_rejects = self._false_accepts = 0
        self._same, self._rejected, self._different, self._accepted = (np.zeros(n, np.int64) for _ in range(4))
        # Pairs of classes as low * n_classes + high, sorted, with their counts; and those not merged in yet.
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._new_keys: list[npt.NDArray[np.int64]] = []
        self._n_new = 0
        self._worst_accepts: list[WorstPair] = []
        self._worst_rejects: list[WorstPair] = []

    def add(self, chunk: Pairs, scores: Scores) -> None:
        """The next pairs in order, with their (P,) scores, none of them NaN."""
        decided_same = accepted(scores, self._threshold)
        false_accept, false_reject = decided_same & ~chunk.is_same, ~decided_same & chunk.is_same
        left, right = self._folder.labels[chunk.left], self._folder.labels[chunk.right]
        for total, of in (
            (self._same, chunk.is_same),
            (self._rejected, false_reject),
            (self._different, ~chunk.is_same),
            (self._accepted, false_accept),
        ):
            total += self._per_class(left, right, of)
        self._add_confused(left[false_accept], right[false_accept])
        self._worst_accepts = self._worst(self._worst_accepts, chunk, scores, np.flatnonzero(false_accept), sign=-1)
        self._worst_rejects = self._worst(self._worst_rejects, chunk, scores, np.flatnonzero(false_reject), sign=1)
        self._n_added += len(scores)
        self._false_rejects += int(false_reject.sum())
        self._false_accepts += int(false_accept.sum())

    @property
    def worst_accepts(self) -> list[WorstPair]:
        """Different pairs that were accepted, the highest score first; of equal scores the earlier pair."""
        return list(self._worst_accepts)

    @property
    def worst_rejects(self) -> list[WorstPair]:
        """Same pairs that were rejected, the lowest score first; of equal scores the earlier pair."""
        return list(self._worst_rejects)

    def rows(self) -> list[ClassRow]:
        """The classes that occur in a pair, worst first.

        Worst is the class with the largest share of all false rejects plus its share of all false accepts: a class
        with many mistakes comes before one that has a single pair, and neither kind of mistake drowns the other.
        """
        names, n_images = self._folder.class_names, np.bincount(self._folder.labels, minlength=len(self._same))
        badness = self._rejected / max(1, self._false_rejects) + self._accepted / max(1, self._false_accepts)
        confused = self._confused_with()
        return [
            ClassRow(
                names[c],
                int(n_images[c]),
                int(self._same[c]),
                int(self._rejected[c]),
                int(self._different[c]),
                int(self._accepted[c]),
                tuple((names[other], count) for other, count in confused.get(c, [])),
            )
            for c in np.argsort(-badness, kind="stable").tolist()
            if self._same[c] + self._different[c]
        ]

    def _per_class(
        self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], of: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """(n_classes,) pairs of the kind `of` in which the class occurs, on one side or both."""
        left, right = left[of], right[of]
        classes = np.concatenate([left, right[left != right]])
        return np.bincount(classes, minlength=len(self._same))

    def _add_confused(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
        self._new_keys.append(np.minimum(left, right) * len(self._same) + np.maximum(left, right))
        self._n_new += len(left)
        if self._n_new > max(_MERGE_FROM, len(self._keys)):
            self._merge_new()

    def _merge_new(self) -> None:
        new, n_new = np.unique(np.concatenate([np.zeros(0, np.int64), *self._new_keys]), return_counts=True)
        self._keys, place = np.unique(np.concatenate([self._keys, new]), return_inverse=True)
        merged = np.zeros(len(self._keys), np.int64)
        np.add.at(merged, place, np.concatenate([self._counts, n_new]))
        self._counts = merged
        self._new_keys, self._n_new = [], 0

    def _confused_with(self) -> dict[int, list[tuple[int, int]]]:
        """Class -> the CONFUSED_CLASSES others it was most often taken for, with counts."""
        self._merge_new()
        low, high = np.divmod(self._keys, len(self._same))
        two = low != high  # a list of pairs may call two pictures of one class different
        one, other = np.concatenate([low, high[two]]), np.concatenate([high, low[two]])
        count = np.concatenate([self._counts, self._counts[two]])
        order = np.lexsort([other, -count, one])
        one, other, count = one[order], other[order], count[order]
        rank = np.arange(len(one)) - np.searchsorted(one, one, side="left")
        best: dict[int, list[tuple[int, int]]] = {}
        for c, o, n in zip(*(values[rank < CONFUSED_CLASSES].tolist() for values in (one, other, count)), strict=True):
            best.setdefault(c, []).append((o, n))
        return best

    def _worst(
        self, known: list[WorstPair], chunk: Pairs, scores: Scores, wrong: npt.NDArray[np.int64], *, sign: int
    ) -> list[WorstPair]:
        """The first self._kept of `known` and the pairs `wrong` of the chunk, by sign * score, then index."""
        key = sign * scores[wrong].astype(np.float64)
        if known and len(known) == self._kept:  # an equal score comes later, so it does not displace
            better = key < sign * known[-1].score
            key, wrong = key[better], wrong[better]
        found = wrong[np.argsort(key, kind="stable")[: self._kept]]
        merged = known + [
            WorstPair(self._n_added + int(k), int(chunk.left[k]), int(chunk.right[k]), float(scores[k])) for k in found
        ]
        return sorted(merged, key=lambda pair: (sign * pair.score, pair.index))[: self._kept]
