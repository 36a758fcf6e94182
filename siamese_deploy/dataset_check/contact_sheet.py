"""One picture that shows what a check found: equal and similar pictures side by side, odd ones with their reason."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from siamese_deploy.dataset_check.check import CheckedFolder, DatasetReport
from siamese_deploy.dataset_check.findings import KINDS, Finding
from siamese_deploy.errors import ImageError
from siamese_deploy.pair_picture import fit, image_tile, missing_tile, printable
from siamese_deploy.preprocess import FORMATS

COLUMNS = 8
GROUPS_A_KIND = 8
TILES_A_GROUP = 4
OVERVIEW_CLASSES = 96

_TILE, _GAP, _MARGIN = 120, 8, 16
_CELL = _TILE + _GAP
_WIDTH = COLUMNS * _CELL - _GAP + 2 * _MARGIN
_CAPTION, _REASON = 32, 18
_HEADING = 34
_PAPER, _INK, _SOFT, _LINE = (255, 255, 255), (20, 20, 20), (90, 90, 90), (205, 205, 205)
# Of Okabe and Ito's palette, which people with colour vision deficiency can tell apart.
_COLOURS = {"error": (213, 94, 0), "warning": (204, 121, 167), "note": (0, 114, 178)}

# Of the others there is nothing to see.
_PICTURED = (
    "leakage", "label-conflict", "unreadable", "near-leakage", "near-conflict", "duplicate", "flat", "exif",
    "wrong-extension", "multi-frame", "tiny",
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """Tiles that belong together, under one line that says why."""

    paths: tuple[str, ...]
    reason: str
    in_tile: str = ""
    """What to write where a picture cannot be shown."""


@dataclass(frozen=True)
class _Section:
    title: str
    colour: tuple[int, int, int]
    groups: tuple[_Group, ...]


def contact_sheet(report: DatasetReport) -> bytes:
    """A PNG file. Each kind of finding that has something to see gets a heading and at most GROUPS_A_KIND groups of at
    most TILES_A_GROUP pictures; where there is no such finding, the sheet shows the first picture of each class, of at
    most OVERVIEW_CLASSES classes a folder."""
    sections = list(_sections(report.findings)) or [_overview(checked) for checked in report.folders]
    rows = [(section, list(_rows(section.groups))) for section in sections]
    height = sum(_HEADING + sum(_row_height(row) for row in in_section) for _, in_section in rows) + 2 * _MARGIN
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    draw, y = ImageDraw.Draw(sheet), _MARGIN
    for section, in_section in rows:
        _draw_heading(draw, y, section)
        y += _HEADING
        for row in in_section:
            x = _MARGIN
            for group in row:
                x = _draw_group(sheet, draw, x, y, group, len(report.folders) > 1)
            y += _row_height(row)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _sections(findings: Sequence[Finding]) -> Iterator[_Section]:
    for code, of_kind in groupby(findings, key=lambda finding: finding.code):
        shown = [finding for finding in of_kind if finding.paths]
        if code not in _PICTURED or not shown:
            continue
        groups = tuple(_group(finding) for finding in shown[:GROUPS_A_KIND])
        more = f", {GROUPS_A_KIND} of them shown" if len(shown) > GROUPS_A_KIND else ""
        kind = KINDS[code]
        yield _Section(f"{kind.severity}: {kind.title} ({len(shown):,}{more})", _COLOURS[kind.severity], groups)


def _group(finding: Finding) -> _Group:
    if finding.code == "unreadable":
        return _Group(finding.paths, "", finding.message.replace(f" ({', '.join(FORMATS)})", ""))
    return _Group(finding.paths, finding.message)


def _overview(checked: CheckedFolder) -> _Section:
    folder, seen = checked.folder, set()
    groups = []
    for image, audit in enumerate(checked.audits):
        name = folder.class_name(image)
        if name not in seen and not audit.reason:
            seen.add(name)
            groups.append(_Group((str(folder.absolute_path(image)),), ""))
    more = f", {OVERVIEW_CLASSES} of them shown" if len(groups) > OVERVIEW_CLASSES else ""
    title = f"{folder.root.name}: the first picture of each of {len(groups):,} classes{more}"
    return _Section(title, _COLOURS["note"], tuple(groups[:OVERVIEW_CLASSES]))


def _rows(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """As many groups a row as fit; a group is never broken."""
    waiting = iter(groups)
    row: list[_Group] = []
    for group in waiting:
        if sum(_tiles(other) for other in row) + _tiles(group) > COLUMNS:
            yield row
            row = []
        row.append(group)
    if row:
        yield row


def _tiles(group: _Group) -> int:
    return min(len(group.paths), TILES_A_GROUP)


def _row_height(row: Sequence[_Group]) -> int:
    return _TILE + _CAPTION + (_REASON if any(group.reason for group in row) else 0) + _GAP


def _draw_heading(draw: ImageDraw.ImageDraw, y: int, section: _Section) -> None:
    draw.rectangle((_MARGIN, y + 4, _MARGIN + 5, y + 22), fill=section.colour)
    font = ImageFont.load_default(16)
    draw.text((_MARGIN + 14, y + 13), fit(draw, section.title, font, _WIDTH - 3 * _MARGIN), _INK, font, anchor="lm")


def _draw_group(sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, group: _Group, with_root: bool) -> int:
    """Returns the x at which the next group begins."""
    font, count = ImageFont.load_default(12), _tiles(group)
    width = count * _CELL - _GAP
    top = y + (_REASON if group.reason else 0)
    if group.reason:
        hidden = len(group.paths) - count
        reason = f"{group.reason} (+ {hidden:,} more)" if hidden else group.reason
        draw.text((x, y + _REASON / 2 - 1), fit(draw, reason, font, width), _SOFT, font, anchor="lm")
    for path in islice(group.paths, count):
        sheet.paste(_tile(path, group.in_tile), (x, top))
        draw.rectangle((x, top, x + _TILE - 1, top + _TILE - 1), outline=_LINE)
        for line, text in enumerate(_caption(path, with_root)):
            place = (x, top + _TILE + 9 + 14 * line)
            draw.text(place, fit(draw, text, font, _TILE), _SOFT if line else _INK, font, anchor="lm")
        x += _CELL
    if count > 1:  # a bar that joins what belongs together
        draw.rectangle((x - _CELL * count, top - 2, x - _GAP - 1, top - 1), fill=_INK)
    return x


def _caption(path: str, with_root: bool) -> tuple[str, str]:
    """Class and file; of two folders, the class says which one it is of."""
    *above, file = Path(path).parts
    return "/".join(above[-2:] if with_root else above[-1:]), file


def _tile(path: str, reason: str) -> Image.Image:
    """The picture; of one that cannot be used, the `reason` in its place."""
    try:
        return image_tile(Path(path)).resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    except ImageError as error:
        tile = missing_tile().resize((_TILE, _TILE))
        draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
        lines = textwrap.wrap(printable(reason or error.reason), 18, max_lines=7, placeholder=" ...")
        draw.text((_TILE / 2, _TILE / 2), "\n".join(lines), _COLOURS["error"], font, anchor="mm", align="center")
        return tile
