"""Pictures that look alike: perceptual hashes of 64 bits, and the pairs of them that differ in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image

from siamese_deploy.dataset_check.picture_audit import PerceptualHash
from siamese_deploy.errors import needs_extra

HASH_BITS = 64
MIN_SET_BITS = 16
"""A DCT hash has 32 bits set of a picture with some structure; a plain gradient or a half-black card has next to none,
and all of those are alike."""

# Of every 16-bit number; NumPy counts bits itself only from version 2 on.
_SET_BITS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, np.uint8)


def perceptual_hasher() -> PerceptualHash:
    """The function from a picture to its 64-bit DCT hash ("pHash"), or None for one too plain to have a useful hash.

    Raises:
        MissingExtraError: ImageHash is not installed.
    """
    with needs_extra("check"):
        import imagehash
        import scipy.fftpack  # noqa: F401 - ImageHash imports it in the middle of its work

    def perceptual_hash(image: Image.Image) -> int | None:
        bits = imagehash.phash(image).hash
        return int.from_bytes(np.packbits(bits).tobytes(), "big") if bits.sum() >= MIN_SET_BITS else None

    return perceptual_hash


def close_pairs(
    hashes: npt.NDArray[np.uint64], distance: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """All pairs of `hashes` (n,) that differ in at most `distance` of 64 bits, each pair once, in chunks.

    Two hashes that differ in at most d bits agree in at least one of d + 1 bands of the bits, so only hashes that
    agree in a band are compared: far fewer than all pairs.

    Yields:
        left (k,), right (k,) with left < right, indices into `hashes`; how many bits differ (k,).
    """
    edges = [HASH_BITS * k // (distance + 1) for k in range(distance + 2)]
    masks = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    for band, mask in enumerate(masks):
        keys = hashes & mask
        order = np.argsort(keys, kind="stable")
        in_order = keys[order]
        step, at = 1, np.arange(len(hashes) - 1)
        while (at := at[in_order[at] == in_order[at + step]]).size:
            left, right = order[at], order[at + step]  # a stable sort: left < right
            differing = hashes[left] ^ hashes[right]
            bits = _SET_BITS[differing.view(np.uint16).reshape(-1, 4)].sum(axis=1, dtype=np.uint8)
            found = bits <= distance
            for earlier in masks[:band]:  # they agreed there already, and were given
                found &= (differing & earlier) != 0
            if found.any():
                yield left[found], right[found], bits[found]
            step += 1
            at = at[at + step < len(hashes)]
