"""bench.png: latency against throughput, a point for each row that embeds pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from siamese_deploy.bench.run import Row
from siamese_deploy.pair_picture import fit

_WIDTH, _HEIGHT = 960, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 660, 56, 540
_PAPER, _INK, _SOFT, _GRID = (255, 255, 255), (20, 20, 20), (100, 100, 100), (228, 228, 228)
# Okabe and Ito's palette.
_COLOURS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0),
)  # fmt: skip
_LEGEND_LINES = 18
_SHAPES = {"SingleStream": 0, "MultiStream": 4, "Offline": 3}
"""Corners of the mark; 0 is a disk."""


def chart_png(rows: Sequence[Row]) -> bytes:
    """A PNG file; both axes are logarithmic."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw = ImageDraw.Draw(picture)
    bold, plain, small = (ImageFont.load_default(size) for size in (17, 13, 12))
    draw.text((_LEFT, 26), "Latency against throughput: up and left is better", _INK, bold, anchor="lm")
    points = [
        (row, latency, row.pairs_per_s)
        for row in rows
        if row.scenario in _SHAPES and (latency := row.latency_ms.get("p50")) and row.pairs_per_s
    ]
    if not points:
        draw.text((_LEFT, _TOP + 30), "no row worked", _INK, plain, anchor="lm")
    x_axis, y_axis = _Axis([latency for _, latency, _ in points]), _Axis([rate for _, _, rate in points])
    for value in x_axis.ticks():
        x = _LEFT + x_axis.part(value) * (_RIGHT - _LEFT)
        draw.line((x, _TOP, x, _BOTTOM), _GRID)
        draw.text((x, _BOTTOM + 14), f"{value:g}", _SOFT, small, anchor="mm")
    for value in y_axis.ticks():
        y = _BOTTOM - y_axis.part(value) * (_BOTTOM - _TOP)
        draw.line((_LEFT, y, _RIGHT, y), _GRID)
        draw.text((_LEFT - 8, y), f"{value:g}", _SOFT, small, anchor="rm")
    draw.rectangle((_LEFT, _TOP, _RIGHT, _BOTTOM), outline=_SOFT)
    draw.text(((_LEFT + _RIGHT) / 2, _BOTTOM + 38), "p50 latency of a query, ms", _INK, plain, anchor="mm")
    draw.text((8, _TOP - 10), "pairs/s", _INK, plain, anchor="lm")
    series = list(dict.fromkeys(_series(row) for row, _, _ in points))
    for row, latency, rate in points:
        x = _LEFT + x_axis.part(latency) * (_RIGHT - _LEFT)
        y = _BOTTOM - y_axis.part(rate) * (_BOTTOM - _TOP)
        _mark(draw, x, y, row.scenario, _COLOURS[series.index(_series(row)) % len(_COLOURS)])
        if row.scenario == "Offline":
            draw.text((x + 10, y), f"{row.batch}", _SOFT, small, anchor="lm")
    _legend(draw, series, plain)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


class _Axis:
    """Logarithmic, with room at both ends."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = (math.log10(end) for end in (min(values, default=1.0), max(values, default=10.0)))
        room = max(0.08 * (high - low), 0.25)  # half a decade holds a tick at least
        self.low, self.high = low - room, high + room

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each decade, or only 1 where that would be many."""
        steps = (1, 2, 5) if self.high - self.low < 3 else (1,)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        return [mark for mark in marks if 0 <= self.part(mark) <= 1]


def _series(row: Row) -> tuple[str, str, str]:
    return row.bundle, row.precision, row.provider


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, scenario: str, colour: tuple[int, int, int]) -> None:
    corners = _SHAPES[scenario]
    if corners:
        draw.regular_polygon((x, y, 7), corners, rotation=0, fill=colour, outline=_PAPER)
    else:
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour, outline=_PAPER)


def _legend(
    draw: ImageDraw.ImageDraw,
    series: Sequence[tuple[str, str, str]],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = _RIGHT + 24, _TOP + 10
    about = {
        "SingleStream": "1 pair a query",
        "MultiStream": "8 pairs a query",
        "Offline": "time a group, batch beside",
    }
    for scenario, text in about.items():
        _mark(draw, x, y, scenario, _SOFT)
        draw.text((x + 16, y), f"{scenario}: {text}", _INK, font, anchor="lm")
        y += 22
    y += 10
    for k, name in enumerate(series[:_LEGEND_LINES]):
        draw.rectangle((x - 6, y - 6, x + 6, y + 6), fill=_COLOURS[k % len(_COLOURS)])
        draw.text((x + 16, y), fit(draw, "  ".join(name), font, _WIDTH - x - 24), _INK, font, anchor="lm")
        y += 22
    if len(series) > _LEGEND_LINES:
        draw.text((x + 16, y), f"and {len(series) - _LEGEND_LINES} more", _SOFT, font, anchor="lm")
