"""One picture per pair: both images in colour, their classes, the score, and a frame that says right or wrong."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from siamese_deploy.preprocess import decode_image

TILE_PIXELS = 192
_MARGIN = 8
_TITLE = 24
_FOOTER = 22
_WIDTH = 2 * TILE_PIXELS + 3 * _MARGIN
_HEIGHT = TILE_PIXELS + _TITLE + _FOOTER + _MARGIN
_ROOM_FOR_NAME = (_WIDTH - 80) / 2 - 2 * _MARGIN  # beside "conf=0.00"
_PAPER, _INK, _GREY = (255, 255, 255), (20, 20, 20), (235, 235, 235)
# Blue and orange of Okabe and Ito's palette, which people with colour vision deficiency can tell apart.
_RIGHT, _WRONG = (0, 114, 178), (213, 94, 0)


def image_tile(path: Path) -> Image.Image:
    """(TILE_PIXELS, TILE_PIXELS) RGB thumbnail of a picture file, aspect ratio kept, on grey.

    Raises:
        ImageError: the file cannot be used.
    """
    image = decode_image(path)
    scale = TILE_PIXELS / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    tile = Image.new("RGB", (TILE_PIXELS, TILE_PIXELS), _GREY)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    tile.paste(resized, ((TILE_PIXELS - width) // 2, (TILE_PIXELS - height) // 2))
    return tile


def missing_tile() -> Image.Image:
    """An empty tile, for a picture that has gone since it was scored."""
    return Image.new("RGB", (TILE_PIXELS, TILE_PIXELS), _GREY)


def side_by_side(left: Image.Image, right: Image.Image) -> bytes:
    """Two tiles as one JPEG file."""
    picture = Image.new("RGB", (2 * TILE_PIXELS + _MARGIN, TILE_PIXELS), _PAPER)
    picture.paste(left, (0, 0))
    picture.paste(right, (TILE_PIXELS + _MARGIN, 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def pair_picture(
    left: Image.Image, right: Image.Image, classes: tuple[str, str], score: float, is_same: bool, threshold: float
) -> Image.Image:
    """Two tiles under "class  score  class", framed blue where the decision is right, orange where it is wrong."""
    picture = _frame(is_same, score >= threshold).copy()
    picture.paste(left, (_MARGIN, _TITLE + _MARGIN // 2))
    picture.paste(right, (2 * _MARGIN + TILE_PIXELS, _TITLE + _MARGIN // 2))
    middle = _TITLE // 2 + 2
    confidence = _label(f"conf={score:.2f}", 15, _INK)
    one, other = (_label(name, 13, _INK, _ROOM_FOR_NAME) for name in classes)
    for label, x in (
        (confidence, (_WIDTH - confidence.width) // 2),
        (one, _MARGIN),
        (other, _WIDTH - _MARGIN - other.width),
    ):
        picture.paste(label, (x, middle - label.height // 2))
    return picture


# Writing text and filling rectangles would take most of the time of a picture; there are few different ones.
@lru_cache(maxsize=4)
def _frame(is_same: bool, decided_same: bool) -> Image.Image:
    """What is the same in all pairs with that truth and that decision."""
    colour = _RIGHT if decided_same == is_same else _WRONG
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    truth, decision = ("same" if same else "different" for same in (is_same, decided_same))
    verdict = _label(f"{decision}: {'right' if decided_same == is_same else 'wrong, they are ' + truth}", 13, colour)
    picture.paste(verdict, ((_WIDTH - verdict.width) // 2, _HEIGHT - _FOOTER // 2 - 2 - verdict.height // 2))
    ImageDraw.Draw(picture).rectangle((0, 0, _WIDTH - 1, _HEIGHT - 1), outline=colour, width=3)
    return picture


@lru_cache(maxsize=1024)
def _label(text: str, size: int, colour: tuple[int, int, int], room: float = _WIDTH) -> Image.Image:
    """The text on paper, as wide as it is and at most `room` pixels."""
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text = fit(draw, text, font, room)
    label = Image.new("RGB", (round(draw.textlength(text, font)) + 1, size + 5), _PAPER)
    ImageDraw.Draw(label).text((0, (size + 5) / 2), text, colour, font, anchor="lm")
    return label


def write_png(picture: Image.Image, path: Path) -> None:
    """An RGB picture as a PNG file, in less than half of the time that Pillow's own writer takes for one.

    Pillow tries every filter on every row; here no row is filtered (PNG specification, section 9).
    """
    width, height = picture.size
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter's number
    rows[:, 1:] = np.asarray(picture).reshape(height, 3 * width)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB
        (b"IDAT", zlib.compress(rows.data, 1)),
        (b"IEND", b""),
    )
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks:
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(name + data))]
    path.write_bytes(b"".join(parts))


def fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """The text, with its middle left out where it is too long: names of classes often differ in their ends."""
    text = printable(text)
    shown, kept = text, min(len(text), 300)
    while kept > 2 and draw.textlength(shown, font) > room:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}"
    return shown


def printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
