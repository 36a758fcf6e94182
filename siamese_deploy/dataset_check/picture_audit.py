"""One picture file, fully decoded: can it be used, is there something odd about it, and what else equals it?"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageOps

from siamese_deploy.dataset_check.file_content import EXTENSION_FORMATS, HEAD_BYTES, content_format, looks_like
from siamese_deploy.errors import ImageError
from siamese_deploy.preprocess import FORMATS, decode_bytes, read_picture_file

TINY_SIDE_PIXELS = 16
"""A usable picture with a shorter side than this is remarked on."""
FLAT_LEVELS = 8
FLAT_SHARE = 0.999
"""Flat: in each colour, this share of the pixels is within FLAT_LEVELS (of 255) of the median."""

PerceptualHash: TypeAlias = Callable[[Image.Image], "int | None"]

_ORIENTATION, _SHORT = 0x0112, 3


@dataclass(frozen=True)
class PictureAudit:
    reason: str = ""
    """Why the picture cannot be used; empty: it can."""
    file_digest: bytes = b""
    """SHA-256 of the file; empty where it could not be read."""
    pixel_digest: bytes = b""
    """SHA-256 of size and decoded RGB pixels; empty where it could not be decoded."""
    perceptual_hash: int | None = None
    """64 bits; None: not asked for, or the picture is too plain to have one."""
    remarks: tuple[tuple[str, str], ...] = ()
    """(code of findings.KINDS, message) of what is odd about a usable picture."""


def audit_picture(path: str, perceptual_hash: PerceptualHash | None = None) -> PictureAudit:
    """Read and decode one file as training and evaluation do. Anything wrong is in the answer, nothing is raised."""
    data = b""
    try:
        data = read_picture_file(path)
        image = decode_bytes(data, path)
    except ImageError as error:
        return PictureAudit(_reason(error.reason, data), hashlib.sha256(data).digest() if data else b"")
    remarks = list(_remarks_on_file(path, data))
    if min(image.size) < TINY_SIDE_PIXELS:
        remarks.append(("tiny", f"only {image.width}x{image.height} pixels"))
    flat = is_flat(image)
    if flat:
        remarks.append(("flat", "almost one colour"))
    pixels = hashlib.sha256(b"%dx%d:" % image.size)
    pixels.update(image.tobytes())
    return PictureAudit(
        file_digest=hashlib.sha256(data).digest(),
        pixel_digest=pixels.digest(),
        perceptual_hash=perceptual_hash(image) if perceptual_hash and not flat else None,
        remarks=tuple(remarks),
    )


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB image is almost one colour; a thin line on paper is enough for False."""
    counts, pixels = image.histogram(), image.width * image.height
    for band in (counts[:256], counts[256:512], counts[512:]):
        below, median = 0, 0
        for median, count in enumerate(band):  # noqa: B007 - the level where the loop stops
            below += count
            if 2 * below >= pixels:
                break
        if sum(band[max(0, median - FLAT_LEVELS) : median + FLAT_LEVELS + 1]) < FLAT_SHARE * pixels:
            return False
    return True


def _reason(reason: str, data: bytes) -> str:
    """The decoder's reason, and what the file is instead of a picture where that can be told."""
    head = data[:HEAD_BYTES]
    kind = looks_like(head)
    if kind is None or content_format(head) or "looks like" in reason:
        return reason
    return f"{reason}; looks like {kind}"


def _remarks_on_file(path: str, data: bytes) -> list[tuple[str, str]]:
    remarks = []
    content = content_format(data[:HEAD_BYTES])
    named = EXTENSION_FORMATS.get(os.path.splitext(path)[1].lower())
    if content and named and content != named:
        remarks.append(("wrong-extension", f"{content} named like {named}"))
    exif = b""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            exif = header.info.get("exif", b"")
            # Phones store depth and brightness maps behind the photo (MPO): nobody takes those for further pictures.
            if getattr(header, "is_animated", False) and header.format != "MPO":
                remarks.append(("multi-frame", "more than one frame"))
    except Exception:  # it was decoded, so whatever this is about does not keep it from being used
        remarks.append(("multi-frame", "its further frames cannot be read"))
    fault = exif_fault(exif) if isinstance(exif, bytes) and exif else None
    if fault:
        remarks.append(("exif", fault))
    return remarks


def exif_fault(exif: bytes) -> str | None:
    """Why the orientation in a picture's EXIF block cannot be relied on; None: it can, or there is none."""
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return "no EXIF header"
    try:
        (start,) = struct.unpack_from(f"{order}L", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, start)
        orientation = 1
        for k in range(entries):
            tag, kind, count, value = struct.unpack_from(f"{order}HHLH", block, start + 2 + 12 * k)
            if tag == _ORIENTATION:
                orientation = value if (kind, count) == (_SHORT, 1) else -1
    except struct.error:
        return "EXIF is cut short"
    if not 0 <= orientation <= 8:  # 0 is what many cameras write for "not known"
        return "orientation not 1 to 8"
    try:  # Pillow rewrites the block when it turns the picture, and may fail on other entries of it
        probe = Image.new("L", (2, 1))
        probe.info["exif"] = exif
        ImageOps.exif_transpose(probe)
    except Exception as error:
        return f"EXIF unusable ({type(error).__name__})"
    return None
