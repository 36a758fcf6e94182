"""Small multiples of cost against size, log-log, with the fitted lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scaling_fit import Series

PANELS = (
    ("Embedding: pictures", ("images_224", "images_32")),
    ("Decoding: size of the picture", ("pixels",)),
    ("Scoring: pairs", ("pairs",)),
    ("identify: gallery rows", ("rows_first", "rows")),
    ("Backbone: pictures in a run", ("batch",)),
    ("Head: pairs in a run", ("head_batch",)),
    ("Threads", ("threads_backbone", "threads_head")),
    ("Memory of a process", ("memory_images", "memory_pairs", "memory_rows")),
)
LABELS = {
    "images_224": "224 px",
    "images_32": "32 px",
    "rows_first": "first question",
    "rows": "further ones",
    "threads_backbone": "backbone, 8 pictures",
    "threads_head": "head, 8,192 pairs",
    "memory_images": "embedding, by pictures",
    "memory_pairs": "scoring, by pairs",
    "memory_rows": "identify, by rows",
}
COLOURS = ("#0b5fa5", "#c4601d", "#3a7d44")


def draw(series: Sequence[Series], machine: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    by_name = {one.name: one for one in series}
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 8), dpi=100, layout="constrained")
    for panel, (title, names) in zip(axes.flat, PANELS, strict=True):
        shown = [by_name[name] for name in names]
        for colour, one in zip(COLOURS, shown, strict=False):
            _plot(panel, one, colour)
        _label(panel, title, shown)
    figure.suptitle(f"Cost against size (points: medians; lines: fits)\n{machine}", fontsize=13)
    figure.savefig(path)
    pyplot.close(figure)


def _plot(panel, one: Series, colour: str) -> None:  # type: ignore[no-untyped-def]
    name = LABELS.get(one.name, "measured")
    if one.fit is None:
        panel.plot(one.sizes, one.costs, "o-", color=colour, markersize=5, linewidth=1, label=name)
        return
    power = "" if one.is_memory else f": exponent {one.fit.exponent:.2f} ± {one.fit.error:.2f}"
    panel.plot(one.sizes, one.costs, "o", color=colour, markersize=5, label=name + power)
    if one.is_memory:
        n = np.geomspace(one.sizes[0], one.sizes[-1], 100)
        panel.plot(n, one.fit.constant + one.fit.slope * n, color=colour, linewidth=1)
        return
    upper = [(np.log(n), np.log(c)) for n, c in zip(one.sizes, one.costs, strict=True) if n >= one.fit.first]
    middle_n, middle_c = np.mean(upper, axis=0)  # a line of least squares goes through the mean
    for ends, style in (((one.fit.first, one.sizes[-1]), "-"), ((one.sizes[0], one.fit.first), ":")):
        n = np.array(ends)
        panel.plot(n, np.exp(middle_c + one.fit.exponent * (np.log(n) - middle_n)), style, color=colour, linewidth=1.2)


def _label(panel, title: str, shown: Sequence[Series]) -> None:  # type: ignore[no-untyped-def]
    memory, threads = shown[0].is_memory, shown[0].name.startswith("threads")
    panel.set_title(title, fontsize=12)
    panel.set_xscale("log", base=2 if threads else 10)
    panel.set_yscale("log")
    panel.xaxis.set_minor_formatter("")  # on less than a decade it names every tick, one over the other
    if threads:
        panel.set_xticks(shown[0].sizes, [f"{size:g}" for size in shown[0].sizes])
    panel.set_xlabel("pictures, pairs or rows" if memory else shown[0].of)
    panel.set_ylabel("peak, MiB" if memory else "seconds")
    lowest = min(min(one.costs) for one in shown)
    highest = max(max(one.costs) for one in shown)
    if highest < 20 * lowest:  # less than a decade has no labelled tick of its own
        ticks = [k * 10.0**e for e in range(-7, 7) for k in (1, 2, 5)]
        inside = [tick for tick in ticks if lowest / 2 <= tick <= highest * 2]
        panel.set_yticks(inside, [f"{tick:g}" for tick in inside])
        panel.minorticks_off()
    panel.set_ylim(lowest / 2, highest * 6)  # room for the legend
    panel.grid(visible=True, color="#dddddd", linewidth=0.6)
    panel.legend(fontsize=9, loc="upper left", framealpha=0.9)
