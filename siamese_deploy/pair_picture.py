"""One picture per pair: both images in colour, their classes, the score, and a frame that says right or wrong."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from siamese_deploy.preprocess import decode_image

TILE_PIXELS = 192
_MARGIN = 8
_TITLE = 24
_FOOTER = 22
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
    decided_same = score >= threshold
    colour = _RIGHT if decided_same == is_same else _WRONG
    width = 2 * TILE_PIXELS + 3 * _MARGIN
    height = TILE_PIXELS + _TITLE + _FOOTER + _MARGIN
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    picture.paste(left, (_MARGIN, _TITLE + _MARGIN // 2))
    picture.paste(right, (2 * _MARGIN + TILE_PIXELS, _TITLE + _MARGIN // 2))
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    confidence = f"conf={score:.2f}"
    draw.text((width / 2, _TITLE / 2 + 2), confidence, _INK, bold, anchor="mm")
    room = (width - draw.textlength(confidence, bold)) / 2 - 2 * _MARGIN
    draw.text((_MARGIN, _TITLE / 2 + 2), fit(draw, classes[0], plain, room), _INK, plain, anchor="lm")
    draw.text((width - _MARGIN, _TITLE / 2 + 2), fit(draw, classes[1], plain, room), _INK, plain, anchor="rm")
    truth, decision = ("same" if same else "different" for same in (is_same, decided_same))
    verdict = f"{decision}: {'right' if decided_same == is_same else 'wrong, they are ' + truth}"
    draw.text((width / 2, height - _FOOTER / 2 - 2), verdict, colour, plain, anchor="mm")
    draw.rectangle((0, 0, width - 1, height - 1), outline=colour, width=3)
    return picture


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
