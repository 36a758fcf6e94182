"""Counts of scores -> charts as SVG text: in print and without scripts as good as with them.

Colours and fonts come from page.css through classes: `same` and `different` pairs, `ink`, `grid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics import MIN_FALSE_ACCEPTS
from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.report_page.format import NO_BREAK, far_power, number, percent, plain

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 380, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 362, 26, 246
_BINS = 50
_LOWEST_FAR = 1e-4
# Between these points straight lines are exact enough for paper, and quick for millions of values.
_DEVIATES = np.linspace(-4.5, 4.5, 2001)
_NORMAL_CDF = np.array([NormalDist().cdf(deviate) for deviate in _DEVIATES.tolist()])


@dataclass(frozen=True)
class Axis:
    label: str
    ticks: Sequence[tuple[float, str]]
    low: float
    high: float
    scale: Callable[[Floats], Floats] = lambda values: values
    """Applied to values, `low` and `high` before the linear map to the paper: logarithm, normal deviate."""

    def unit(self, values: npt.ArrayLike) -> Floats:
        """Where values lie between `low` (0) and `high` (1); what is outside lies on the edge."""
        inside = np.clip(np.asarray(values, np.float64), self.low, self.high)
        low, high = self.scale(np.array([self.low, self.high]))
        return np.asarray((self.scale(inside) - low) / (high - low))


@dataclass(frozen=True)
class Axes:
    x: Axis
    y: Axis

    def at(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Values -> places on the paper."""
        return _LEFT + self.x.unit(x) * (_RIGHT - _LEFT), _BOTTOM - self.y.unit(y) * (_BOTTOM - _TOP)


@dataclass(frozen=True)
class Rates:
    """What is accepted at every score that occurs, from the strictest threshold to the laxest."""

    far: Floats
    """(n + 1,) ascending; the first is 0: nothing accepted."""
    tar: Floats
    """(n + 1,) ascending."""
    lowest_far: float
    """The lowest FAR that the number of different pairs can resolve, and a chart shows."""
    lowest_frr: float

    @classmethod
    def of(cls, counts: ScoreCounts) -> Rates | None:
        """None where too few pairs of a kind are there to draw anything."""
        n_different, n_same = counts.different_pairs, counts.same_pairs
        if n_different <= 2 * MIN_FALSE_ACCEPTS or n_same == 0:
            return None
        return cls(
            counts.different_accepted[::-1] / n_different,
            counts.same_accepted[::-1] / n_same,
            max(_LOWEST_FAR, MIN_FALSE_ACCEPTS / n_different),
            min(0.1, max(_LOWEST_FAR, MIN_FALSE_ACCEPTS / n_same)),
        )

    def resolved(self) -> tuple[Floats, Floats]:
        """FAR and TAR where the FAR can be resolved; begins at `lowest_far` with the TAR that it allows."""
        first = int(np.searchsorted(self.far, self.lowest_far * (1 + 1e-9), side="right"))
        far = np.concatenate([[self.lowest_far], self.far[first:]])
        return far, np.concatenate([[self.tar[first - 1]], self.tar[first:]])


def histogram_axes(counts: ScoreCounts) -> Axes:
    low = math.floor(float(counts.scores[0]) * 10 - 1e-9) / 10 if len(counts.scores) else 0.0
    high = math.ceil(float(counts.scores[-1]) * 10 + 1e-9) / 10 if len(counts.scores) else 1.0
    low, high = max(0.0, low), min(1.0, high)
    shares = np.concatenate(_shares(counts, low, high))
    decades = min(6, max(2, math.ceil(-math.log10(shares[shares > 0].min())))) if (shares > 0).any() else 2
    ticks = [(round(low + k / 10, 1), f"{low + k / 10:.1f}") for k in range(round((high - low) * 10) + 1)]
    powers = [(10.0**-k, _tick(10.0**-k)) for k in range(decades + 1)]
    return Axes(Axis("score", ticks, low, high), Axis("share of the kind's pairs", powers, 10.0**-decades, 1, np.log10))


def histogram_chart(counts: ScoreCounts, axes: Axes, threshold: float) -> str:
    """Share of each kind of pair per bin of scores, on a logarithmic axis, and the threshold as a line."""
    edges = np.linspace(axes.x.low, axes.x.high, _BINS + 1)
    areas = []
    for kind, shares in zip(("different", "same"), _shares(counts, axes.x.low, axes.x.high), strict=True):
        # A staircase over the bins, closed along the bottom.
        x, y = axes.at(np.repeat(edges, 2), np.concatenate([[0], np.repeat(shares, 2), [0]]))
        areas.append(f'<polygon class="area {kind}" points="{_points(x, y)}"/>')
    x, _ = axes.at(threshold, 1)
    mark = (
        f'<g id="mark-histogram" transform="translate({_f(x)} 0)"><path class="mark" d="M0 {_TOP}V{_BOTTOM}"/>'
        f'<path class="handle" d="M-5 {_BOTTOM + 8}L0 {_BOTTOM}L5 {_BOTTOM + 8}Z"/></g>'
    )
    return _chart(axes, "".join(areas) + mark, "How the scores of same and of different pairs are spread")


def roc_axes(rates: Rates) -> Axes:
    low = 10.0 ** math.floor(math.log10(rates.lowest_far) + 1e-9)
    decades = round(-math.log10(low))
    far = [(10.0**-k, far_power(10.0**-k) if k else "1") for k in range(decades, -1, -1)]
    tar = [(k / 5, _tick(k / 5)) for k in range(6)]
    return Axes(
        Axis("FAR: different pairs accepted", far, low, 1, np.log10), Axis("TAR: same pairs accepted", tar, 0, 1)
    )


def roc_chart(
    rates: Rates,
    axes: Axes,
    points: Sequence[tuple[float, float, tuple[float, float] | None]],
    now: tuple[float, float],
) -> str:
    """The curve, the stated points (FAR, TAR, interval of the TAR), and the threshold in use (FAR, TAR)."""
    chance = np.geomspace(axes.x.low, 1, 60)
    parts = [
        _unresolved(axes, rates.lowest_far),
        f'<polyline class="guide" points="{_points(*axes.at(chance, chance))}"/>',
        f'<polyline class="curve" points="{_points(*axes.at(*rates.resolved()))}"/>',
    ]
    for far, tar, interval in points:
        x, y = axes.at(far, tar)
        if interval is not None:
            _, (low, high) = axes.at([far, far], interval)
            parts.append(f'<path class="whisker" d="M{_f(x)} {_f(low)}V{_f(high)}"/>')
        parts.append(f'<circle class="point" cx="{_f(x)}" cy="{_f(y)}" r="3"/>')
    return _chart(axes, "".join(parts) + _mark("roc", axes, *now), "ROC curve: TAR against FAR")


def det_axes(rates: Rates) -> Axes:
    _, tar = rates.resolved()
    return Axes(
        _deviate_axis("FAR: different pairs accepted", rates.lowest_far, 0.6),
        _deviate_axis("FRR: same pairs rejected", rates.lowest_frr, max(0.6, 1 - float(tar[0]))),
    )


def det_chart(rates: Rates, axes: Axes, eer: float | None, now: tuple[float, float]) -> str:
    """Both errors on normal deviate axes, with the equal error rate and the threshold in use (FAR, TAR)."""
    far, tar = rates.resolved()
    inside = (far <= axes.x.high) & (1 - tar >= axes.y.low)
    diagonal = np.linspace(max(axes.x.low, axes.y.low), min(axes.x.high, axes.y.high), 80)
    parts = [
        _unresolved(axes, rates.lowest_far),
        f'<polyline class="guide" points="{_points(*axes.at(diagonal, diagonal))}"/>',
        f'<polyline class="curve" points="{_points(*axes.at(far[inside], 1 - tar[inside]))}"/>',
    ]
    if eer is not None and eer >= max(axes.x.low, axes.y.low):
        x, y = axes.at(eer, eer)
        # To the left and below where there is no room to the right.
        beside = f'x="{_f(x + 12)}" y="{_f(y + 4)}"'
        if x > _RIGHT - 90:
            beside = f'x="{_f(x - 10)}" y="{_f(y + 16)}" text-anchor="end"'
        parts.append(f'<circle class="point" cx="{_f(x)}" cy="{_f(y)}" r="3"/><text {beside}>EER {percent(eer)}</text>')
    return _chart(axes, "".join(parts) + _mark("det", axes, now[0], 1 - now[1]), "DET curve: FRR against FAR")


def reliability_chart(bins: Sequence[dict[str, Any]]) -> str:
    """Share of same pairs against the mean score of each bin; the dot's area grows with the bin's pairs."""
    ticks = [(k / 5, number(k / 5, 1)) for k in range(6)]
    shares = [(k / 5, _tick(k / 5)) for k in range(6)]
    axes = Axes(Axis("mean score", ticks, 0, 1), Axis("share of same pairs", shares, 0, 1))
    x, y = axes.at([b["mean_score"] for b in bins], [b["same_share"] for b in bins])
    most = max((int(b["pairs"]) for b in bins), default=1)
    parts = [
        f'<polyline class="guide" points="{_points(*axes.at([0, 1], [0, 1]))}"/>',
        f'<polyline class="curve" points="{_points(x, y)}"/>',
    ]
    for cx, cy, each in zip(x, y, bins, strict=True):
        radius = 2.5 + 5 * math.sqrt(each["pairs"] / most)
        parts.append(f'<circle class="point" cx="{_f(cx)}" cy="{_f(cy)}" r="{radius:.1f}"/>')
    return _chart(axes, "".join(parts), "Reliability: how often pairs of a score are the same")


def tar_bars(rows: Sequence[tuple[str, float | None, tuple[float, float] | None, bool]]) -> str:
    """One bar a row of (label, TAR or None, interval, whether it is the one that the headline speaks of)."""
    left, width, pitch = 96, 214, 34
    parts = []
    for k, (label, tar, interval, first) in enumerate(rows):
        y = 18 + k * pitch
        look = ' class="strong"' if first else ""
        parts.append(f'<text{look} x="{left - 10}" y="{y + 4}" text-anchor="end">{plain(label)}</text>')
        if tar is None:
            parts.append(f'<text class="muted" x="{left}" y="{y + 4}">cannot be stated</text>')
            continue
        parts.append(f'<rect class="track" x="{left}" y="{y - 7}" width="{width}" height="14" rx="2"/>')
        parts.append(
            f'<rect class="bar{"" if first else " faint"}" x="{left}" y="{y - 7}" width="{tar * width:.1f}" '
            'height="14" rx="2"/>'
        )
        if interval is not None:
            low, high = (left + bound * width for bound in interval)
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>'
            )
        parts.append(f'<text{look} x="{WIDTH}" y="{y + 4}" text-anchor="end">{percent(tar)}</text>')
    return _svg(36 + (len(rows) - 1) * pitch, "Share of same pairs accepted at each FAR", "".join(parts))


def _shares(counts: ScoreCounts, low: float, high: float) -> tuple[Floats, Floats]:
    """Of different and of same pairs: the share of all of the kind in each bin."""
    bin_of = np.clip(((counts.scores - low) / (high - low) * _BINS).astype(np.int64), 0, _BINS - 1)
    different, same = (
        np.bincount(bin_of, weights=kind, minlength=_BINS) / max(1, int(kind.sum()))
        for kind in (counts.different, counts.same)
    )
    return different, same


def _deviate_axis(label: str, low: float, high: float) -> Axis:
    round_values = (1e-4, 1e-3, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
    high = next((value for value in round_values if value >= high), 0.999)
    low = max(value for value in round_values if value <= max(low, _LOWEST_FAR))
    ticks = [(value, _tick(value)) for value in round_values if low <= value <= high]
    return Axis(label, ticks, low, high, lambda values: np.interp(values, _NORMAL_CDF, _DEVIATES))


def _unresolved(axes: Axes, lowest_far: float) -> str:
    """A shade over the rates at which too few different pairs are left to tell."""
    x, _ = axes.at(lowest_far, axes.y.low)
    width = float(x) - _LEFT
    if width < 1:
        return ""
    return f'<rect class="track" x="{_LEFT}" y="{_TOP}" width="{_f(width)}" height="{_BOTTOM - _TOP}"/>'


def _mark(identity: str, axes: Axes, x: float, y: float) -> str:
    left, top = axes.at(x, y)
    return f'<g id="mark-{identity}" transform="translate({_f(left)} {_f(top)})"><circle class="now" r="5.5"/></g>'


def _points(x: Floats, y: Floats) -> str:
    """A line through places on the paper, to half a unit; points that change nothing are left out."""
    places = np.round(np.stack([np.atleast_1d(x), np.atleast_1d(y)], axis=1) * 2).astype(np.int64)
    if len(places) > 1:
        places = places[np.concatenate([[True], (places[1:] != places[:-1]).any(axis=1)])]
    if len(places) > 2:
        step = np.diff(places, axis=0)
        turns = step[1:, 0] * step[:-1, 1] != step[1:, 1] * step[:-1, 0]
        places = places[np.concatenate([[True], turns, [True]])]
    return " ".join(f"{a / 2:g},{b / 2:g}" for a, b in places.tolist())


def _chart(axes: Axes, content: str, title: str) -> str:
    parts = []
    for value, label in axes.x.ticks:
        x, _ = axes.at(value, axes.y.low)
        parts.append(f'<path class="grid" d="M{_f(x)} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text class="muted" x="{_f(x)}" y="{_BOTTOM + 20}" text-anchor="middle">{label}</text>')
    for value, label in axes.y.ticks:
        _, y = axes.at(axes.x.low, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {_f(y)}H{_RIGHT}"/>')
        parts.append(f'<text class="muted" x="{_LEFT - 7}" y="{_f(y + 4)}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{_BOTTOM + 38}" text-anchor="end">{axes.x.label}</text>')
    parts.append(f'<text x="{_LEFT}" y="12">{plain(axes.y.label)}</text>')
    return _svg(HEIGHT, f"{title}; across: {axes.x.label}, up: {axes.y.label}", "".join(parts) + content)


def _svg(height: int, title: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{plain(title)}">{content}</svg>'


def _tick(share: float) -> str:
    return f"{100 * share:g}{NO_BREAK}%"


def _f(value: npt.ArrayLike) -> str:
    return f"{float(np.asarray(value)):.1f}"
