"""Picture -> uint8 RGB (H, W, 3). The only decoder and the only resizer in the project.

Training puts its augmentation between `decode_image` and `resize_image`; evaluation and deployment call `load_image`,
which is the two in a row. Scaling to floats, mean and standard deviation are inside the network's graph.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from siamese_deploy.errors import ImageError, UsageError, code_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_PIXELS_COSTLY = 25_000_000
"""WebP and JPEG of several scans (progressive), whose decoders hold more than the picture; LAB, slow to convert."""
MAX_PIXELS_RUN_LENGTH = 1_000_000
"""Run-length encoded BMP: Pillow's decoder of it is Python, and a few bytes can stand for a row of any length."""
MIN_SIDE_PIXELS = 8
ALPHA_BACKGROUND = (128, 128, 128)
# Conversion goes by way of several copies; those of a strip are small.
_PIXELS_AT_ONCE = 2**20

Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]"
"""What can be embedded: the path of a picture file, the bytes of one, a Pillow image, or a uint8 array (H, W, 3) RGB
or (H, W) grey."""


@dataclass(frozen=True)
class Preprocess:
    """Everything outside the graphs that changes an embedding; part of a bundle's digest."""

    size_hw: tuple[int, int]
    """(height, width) in pixels that the backbone takes."""
    resize: str = "bilinear-antialiased"
    """Pillow's BILINEAR, whose support widens when shrinking."""
    decode: str = "v1"
    """The rules of `decode_image`; a change of those rules gets a new name."""

    def to_json(self) -> dict[str, Any]:
        return {"size_hw": list(self.size_hw), "resize": self.resize, "decode": self.decode}


def load_image(picture: Picture, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Decode and resize one picture.

    Returns:
        (H, W, 3) uint8 RGB with (H, W) = preprocess.size_hw.

    Raises:
        ImageError: it cannot be read, is no picture of a supported format, is truncated, too small or too large.
        UsageError: not a `Picture`.
    """
    return resize_image(decode_image(picture), preprocess.size_hw)


def decode_image(picture: Picture) -> Image.Image:
    """A full-size Pillow image of mode RGB.

    EXIF orientation is applied; of an animation or a multi-page file the first frame is taken; transparency is laid
    over mid-grey; 16-bit grey is scaled to 8 bits (value / 257); CMYK is converted; colour profiles are ignored. Of a
    Pillow image and an array the same holds as far as it applies: they give what the file they came from gives.

    Raises:
        ImageError, UsageError: as `load_image`.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if isinstance(picture, Image.Image):
        return _guarded("<picture>", b"", lambda: _checked_rgb("<picture>", picture.copy()))
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode_bytes(bytes(picture))
    if not isinstance(picture, str | os.PathLike):
        raise UsageError(
            "picture: expected a path, the bytes of a file, a Pillow image or a uint8 array, "
            f"got {type(picture).__name__}"
        )
    return decode_bytes(read_picture_file(picture), os.fspath(picture))


def decode_bytes(data: bytes, name: str = "<bytes>") -> Image.Image:
    """`decode_image` of the bytes of a picture file; `name` is what errors call it."""
    if not data:
        raise ImageError(name, "empty", code="picture-empty")

    def decode() -> Image.Image:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _checked_rgb(name, image, _most_pixels(image, data))

    return _guarded(name, data, decode)


def resize_image(image: Image.Image, size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Bilinear, antialiased resize of an RGB image to (H, W, 3) uint8; the aspect ratio is not kept."""
    height, width = size_hw
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def read_picture_file(source: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most MAX_FILE_BYTES.

    Raises:
        ImageError: it cannot be read, is empty, too large, or not a regular file.
    """
    path = os.fspath(source)
    try:
        # O_NONBLOCK: a named pipe called x.jpg must not hang the run.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(path, f"cannot be opened ({error.strerror})", code=code_of(error, "unreadable")) from error
    except ValueError as error:
        raise ImageError(path, f"cannot be opened ({error})") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ImageError(path, "not a regular file", code="not-a-file")
    with open(descriptor, "rb") as file:
        if status.st_size == 0:
            raise ImageError(path, "empty file", code="picture-empty")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(
                path,
                f"too large: {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are accepted",
                code="picture-too-large",
            )
        try:
            return file.read()
        except OSError as error:
            raise ImageError(path, f"cannot be read ({error.strerror})", code=code_of(error, "unreadable")) from error


def _from_array(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    if pixels.dtype != np.uint8 or not (colour or pixels.ndim == 2):
        raise UsageError(
            f"picture: expected a uint8 array (H, W, 3) RGB or (H, W) grey, got {pixels.dtype} {pixels.shape}"
        )
    return _guarded("<array>", b"", lambda: _checked_rgb("<array>", Image.fromarray(np.ascontiguousarray(pixels))))


def _most_pixels(image: Image.Image, data: bytes) -> int:
    """Of a file that is open and not yet decoded."""
    if image.format == "WEBP" or image.mode == "LAB" or _has_several_scans(image, data):
        return MAX_PIXELS_COSTLY
    if any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        return MAX_PIXELS_RUN_LENGTH
    return MAX_PIXELS


def _has_several_scans(image: Image.Image, data: bytes) -> bool:
    """Whether libjpeg has to keep all coefficients, 2 bytes each, until it has read the last scan."""
    if not isinstance(image, JpegImageFile) or image.fp is None:
        return False
    # Pillow has read up to the end of the first scan's header, whose length follows from its components.
    start = image.fp.tell() - 2 * image.layers - 8 if image.format == "JPEG" else 0
    return "progressive" in image.info or (start > 0 and data[start : start + 2] != b"\xff\xda")


def _checked_rgb(name: str, image: Image.Image, most: int = MAX_PIXELS) -> Image.Image:
    width, height = image.size
    if width * height > most:
        of_its_kind = "" if most == MAX_PIXELS else " in this kind of file; save it as PNG or plain JPEG"
        raise ImageError(
            name,
            f"too large: {width}x{height} pixels, at most {most:,} are accepted{of_its_kind}",
            code="picture-too-large",
        )
    if min(width, height) < MIN_SIDE_PIXELS:
        raise ImageError(
            name, f"too small: {width}x{height} pixels, at least {MIN_SIDE_PIXELS} a side", code="picture-too-small"
        )
    image.load()
    rgb = _to_rgb(name, image)
    rgb.info = image.info  # where the orientation is
    image.close()  # its pixels: of the largest picture, every copy is 200 MB
    return _upright(rgb)


def _guarded(name: str, data: bytes, decode: Callable[[], Image.Image]) -> Image.Image:
    try:
        return decode()
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more on damaged files
        reason, code = _why_unreadable(data, error)
        raise ImageError(name, reason, code) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF data never costs the picture
        return image


def _to_rgb(path: str, image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(
            path,
            f"pixels of type {image.mode} have no defined range; save it with 8 or 16 bits",
            code="picture-pixel-type",
        )
    width, height = image.size
    rows = max(1, _PIXELS_AT_ONCE // width)
    if height <= rows or (image.mode == "RGB" and not image.has_transparency_data):
        return _strip_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, (*ALPHA_BACKGROUND, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return image.convert("RGB")


def _why_unreadable(data: bytes, error: Exception) -> tuple[str, str]:
    """The reason and its code."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too large: at most {MAX_PIXELS:,} pixels are accepted", "picture-too-large"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "not a picture (looks like an HTML page)", "not-a-picture"
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of a supported format ({', '.join(FORMATS)})", "not-a-picture"
    return f"damaged or truncated ({type(error).__name__}: {error})", "picture-damaged"
