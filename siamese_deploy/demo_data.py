"""Draws a small open-set data set of made-up characters: `siamese demo_data OUT`.

A class is one character: a few curved strokes. Its drawings differ as handwriting does: wobbling points, slant, size,
place, pen width, ink and paper. Training and validation characters are different ones, so a network only does well on
the validation folder if it learned to compare, not to recognise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from siamese_deploy.durable_files import folder_published_as

SIZE_PIXELS = 96
_SUPERSAMPLING = 2
_CURVE_POINTS = 24
_SYLLABLES = ("ka", "lo", "mi", "ru", "te", "va", "so", "ni", "pe", "du", "zi", "fo", "ga", "he", "bu", "ya")

Strokes = list[npt.NDArray[np.float64]]  # each (3, 2): start, control and end point of a curve, in [0, 1]


def draw_character(seed: int, variation: int) -> Image.Image:
    """Drawing `variation` of the character `seed`: RGB, SIZE_PIXELS a side; the same numbers, the same picture."""
    return _draw(_strokes(np.random.RandomState([seed, 0])), np.random.RandomState([seed, 1, variation]))


def write_demo_data(
    out: Path, *, train_classes: int = 60, val_classes: int = 20, drawings: int = 15, seed: int = 1
) -> None:
    """Write out/train/<character>/<n>.png and out/val/<character>/<n>.png; no character is in both.

    Raises:
        UsageError: `out` exists, or its parent folder does not.
    """
    with folder_published_as(out) as temporary:
        for character in range(train_classes + val_classes):
            split = "train" if character < train_classes else "val"
            folder = temporary / split / _name(character)
            folder.mkdir(parents=True)
            for variation in range(drawings):
                draw_character(seed * 100_003 + character, variation).save(folder / f"{variation:02}.png")


def _name(character: int) -> str:
    """A different made-up word for each number below 4096."""
    return "".join(_SYLLABLES[(character >> shift) % 16 ^ shift] for shift in (8, 4, 0))


def _strokes(random: np.random.RandomState) -> Strokes:
    """Two to four curves; each starts where an earlier one ended, or anew, so that characters hang together."""
    strokes: Strokes = []
    for _ in range(random.randint(2, 5)):
        start = strokes[-1][2] if strokes and random.random_sample() < 0.5 else random.uniform(0.1, 0.9, 2)
        end = random.uniform(0.1, 0.9, 2)
        while np.linalg.norm(end - start) < 0.35:  # no dots
            end = random.uniform(0.1, 0.9, 2)
        bend = random.normal(0, 0.3, 2)
        strokes.append(np.stack([start, (start + end) / 2 + bend, end]))
    return strokes


def _draw(strokes: Strokes, random: np.random.RandomState) -> Image.Image:
    side = SIZE_PIXELS * _SUPERSAMPLING
    paper = random.randint(240, 256, 3)
    ink = random.randint(0, 60, 3)
    canvas = Image.new("RGB", (side, side), tuple(int(c) for c in paper))
    draw = ImageDraw.Draw(canvas)
    angle, slant = random.uniform(-0.1, 0.1), random.uniform(-0.1, 0.1)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    change = rotation @ np.array([[1.0, slant], [0.0, 1.0]]) * random.uniform(0.85, 1.0)
    middle = 0.5 + random.uniform(-0.04, 0.04, 2)
    pen = random.uniform(0.06, 0.1) * side
    t = np.linspace(0, 1, _CURVE_POINTS)[:, None]
    for stroke in strokes:
        start, control, end = stroke + random.normal(0, 0.012, stroke.shape)
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
        points = ((curve - 0.5) @ change.T + middle) * side
        draw.line([(float(x), float(y)) for x, y in points], tuple(int(c) for c in ink), round(pen), joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), tuple(int(c) for c in ink))
    small = canvas.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.5))).resize((SIZE_PIXELS, SIZE_PIXELS))
    noisy = np.asarray(small) + random.normal(0, 4, (SIZE_PIXELS, SIZE_PIXELS, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
