"""ImageFolder + seed -> Pairs. No files, no global random state.

"Deterministic" means: the same folder gives the same list on every machine, Python, NumPy and hash seed. Hence only
`RandomState.random_sample` is drawn from (its stream is frozen by NumPy's compatibility policy, and 53-bit fractions
do not depend on the platform's integer width), and everything else is arithmetic on sorted arrays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.errors import InputDataError
from siamese_deploy.image_folder import ImageFolder


@dataclass(frozen=True)
class Pairs:
    left: npt.NDArray[np.int64]
    """(n_pairs,) index into ImageFolder.paths."""
    right: npt.NDArray[np.int64]
    """(n_pairs,) index into ImageFolder.paths."""
    is_same: npt.NDArray[np.bool_]
    """(n_pairs,) True where both pictures are of one class."""

    def __len__(self) -> int:
        return len(self.left)

    def unique_images(self) -> npt.NDArray[np.int64]:
        """(n_images,) sorted indices of the pictures that occur in at least one pair."""
        return np.unique(np.concatenate([self.left, self.right]))

    def where(self, keep: npt.NDArray[np.bool_]) -> Pairs:
        """The pairs at which `keep` (n_pairs,) is True, in the same order."""
        return Pairs(self.left[keep], self.right[keep], self.is_same[keep])

    def digest(self, folder: ImageFolder) -> str:
        """SHA-256 (hex) of the list: for each pair the two relative paths and 0 or 1, each ended by a zero byte."""
        names = [os.fsencode(path) + b"\0" for path in folder.paths]
        digest = hashlib.sha256()
        for left, right, same in zip(self.left.tolist(), self.right.tolist(), self.is_same.tolist(), strict=True):
            digest.update(names[left] + names[right] + (b"1\0" if same else b"0\0"))
        return digest.hexdigest()


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
    class_sizes = np.bincount(folder.labels, minlength=n_classes)
    if n_classes < 2:
        raise InputDataError(
            f"{folder.root}: one class only ({folder.class_names[0]}), so no pairs of different classes can be formed; "
            "expected at least two class folders"
        )
    if class_sizes.max() < 2:
        raise InputDataError(
            f"{folder.root}: each of the {n_classes} classes has one picture only, so no pairs of the same class can "
            "be formed; expected at least one class with two pictures"
        )
    by_class = np.argsort(folder.labels, kind="stable")  # pictures of class c: by_class[start[c] : start[c + 1]]
    class_start = np.concatenate([[0], np.cumsum(class_sizes)])
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


def every_pair(folder: ImageFolder) -> Pairs:
    """Every unordered pair of two pictures: n (n - 1) / 2 of them, 17 bytes each.

    Raises:
        InputDataError: the pairs do not fit into memory.
    """
    try:
        left, right = np.triu_indices(len(folder), 1)
        return Pairs(left, right, folder.labels[left] == folder.labels[right])
    except MemoryError as error:
        raise InputDataError(
            f"{folder.root}: the pairs of {len(folder):,} pictures do not fit into memory; use fewer pictures"
        ) from error
