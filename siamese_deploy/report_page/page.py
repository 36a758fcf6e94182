"""metrics.json, counts of scores, classes and the worst pairs -> report.html: one file that needs nothing else.

Names of files and classes come from strangers: they reach the page as escaped text only, and a Content-Security-Policy
in the page lets nothing run or load but the style and the script that are part of this package.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.report_page.charts import (
    Axes,
    Rates,
    det_axes,
    det_chart,
    histogram_axes,
    histogram_chart,
    reliability_chart,
    roc_axes,
    roc_chart,
    tar_bars,
)
from siamese_deploy.report_page.confusions import ClassRow
from siamese_deploy.report_page.figures import TITLE_FAR, cards, figures_table, interval, lead, run_facts
from siamese_deploy.report_page.format import (
    NO_BREAK,
    NOTHING,
    count,
    data,
    json_script,
    name,
    number,
    percent,
    plain,
    score,
)
from siamese_deploy.report_page.slider import slider_data

_ROWS_SHOWN, _ROWS_AT_MOST = 30, 1000


@dataclass(frozen=True)
class Example:
    """A pair to look at."""

    left: str
    """Path relative to the root."""
    right: str
    left_class: str
    right_class: str
    score: float
    picture: bytes
    """JPEG of both pictures side by side."""


def report_page(
    metrics: dict[str, Any],
    counts: ScoreCounts,
    classes: Sequence[ClassRow],
    accepts: Sequence[Example],
    rejects: Sequence[Example],
) -> str:
    """The text of report.html, encodable as UTF-8 whatever the names are.

    Args:
        metrics: the content of metrics.json; every figure on the page is one of its, or counted at another threshold.
        counts: the scores that `metrics` was computed from.
        classes: worst first, as Confusions.rows gives them.
        accepts: the worst false accepts, worst first; `rejects` the worst false rejects.
    """
    parts = {key: _packaged(f"page.{key}") for key in ("html", "css", "js")}
    charts, marks = _charts(metrics, counts)
    slider, positions = slider_data(metrics, counts, marks)
    return Template(parts["html"]).substitute(
        policy=f"default-src 'none'; img-src data:; style-src {_sha256(parts['css'])}; "
        f"script-src {_sha256(parts['js'])}; base-uri 'none'; form-action 'none'",
        style=parts["css"],
        script=parts["js"],
        title=f"pairs {plain(metrics['pair_digest'][:12])}, model {plain(metrics['model_digest'][:12])}",
        **lead(metrics, classes),
        tar_bars=_tar_bars(metrics),
        cards=cards(metrics),
        accepts=_gallery(accepts, "No different pair was accepted."),
        rejects=_gallery(rejects, "No same pair was rejected."),
        classes=_class_tables(classes),
        histogram=charts["histogram"],
        decisions=_slider(metrics, slider, positions) + _decisions(metrics),
        curves=charts["curves"],
        figures=figures_table(metrics),
        run=run_facts(metrics),
        data=json_script("metrics", metrics) + "\n" + json_script("slider-data", slider),
    )


def _packaged(file: str) -> str:
    return resources.files("siamese_deploy.report_page").joinpath(file).read_text("utf-8")


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _tar_bars(metrics: dict[str, Any]) -> str:
    rows = []
    for far, tar in metrics["tar_at_far"].items():
        label = f"1 in {count(round(1 / float(far)))}"
        rows.append((label, tar, interval(metrics, f"tar_at_far/{far}"), far == TITLE_FAR))
    return tar_bars(rows)


def _charts(metrics: dict[str, Any], counts: ScoreCounts) -> tuple[dict[str, str], list[tuple[str, Axes]]]:
    axes = histogram_axes(counts)
    marks = [("histogram", axes)]
    histogram = histogram_chart(counts, axes, metrics["threshold"])
    curves = []
    rates = Rates.of(counts)
    if rates is None:
        curves.append('<p class="note">No ROC and DET curve: too few pairs of one kind.</p>')
    else:
        at = metrics["at_threshold"]
        now = (at["far"], at["recall"])
        points = [
            (float(far), tar, interval(metrics, f"tar_at_far/{far}"))
            for far, tar in metrics["tar_at_far"].items()
            if tar is not None
        ]
        roc, det = roc_axes(rates), det_axes(rates)
        marks += [("roc", roc), ("det", det)]
        shaded = ""
        if rates.lowest_far > roc.x.low * 1.001:
            shaded = f" Shaded: too few different pairs to tell, below FAR{NO_BREAK}{percent(rates.lowest_far)}."
        curves.append(
            _figure(
                "ROC curve",
                roc_chart(rates, roc, points, now),
                "Dots: the stated rates, with their 95 % intervals. Ring: the threshold. Dashed: chance." + shaded,
            )
        )
        curves.append(
            _figure(
                "DET curve",
                det_chart(rates, det, metrics["eer"], now),
                "Normal deviate axes: scores that are normally distributed give a straight line. Lower left is better.",
            )
        )
    curves.append(
        _figure(
            "Reliability curve",
            reliability_chart(metrics["calibration"]["bins"]),
            "On the dashed line a score of 0.7 means that 7 of 10 such pairs are the same. Larger dots: more pairs. It "
            "depends on the share of same pairs in the list, here "
            f"{percent(metrics['same_pairs'] / max(1, metrics['pairs']))}.",
        )
    )
    return {"histogram": histogram, "curves": "\n".join(curves)}, marks


def _figure(title: str, chart: str, note: str) -> str:
    return f'<figure><figcaption>{title}</figcaption>{chart}<p class="note">{note}</p></figure>'


def _gallery(examples: Sequence[Example], none: str) -> str:
    if not examples:
        return f'<p class="none">{none}</p>'
    figures = []
    for example in examples:
        figures.append(
            f'<figure class="pair"><img alt="{plain(example.left)} and {plain(example.right)}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(example.picture).decode()}">'
            f'<figcaption><span class="score">{number(example.score, 4)}</span>'
            f"{_caption(example.left, example.left_class)}{_caption(example.right, example.right_class)}"
            "</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _caption(path: str, of_class: str) -> str:
    shown = name(path).replace("/", "/<wbr>").replace("</<wbr>bdi>", "</bdi>")
    return f"<span>{shown}</span>" if path.startswith(f"{of_class}/") else f"<span>{shown} ({name(of_class)})</span>"


def _class_tables(classes: Sequence[ClassRow]) -> str:
    worst = max([_share(row.accepted, row.different_pairs) for row in classes], default=0.0) or 1.0
    rows = [_class_row(row, worst) for row in classes[:_ROWS_AT_MOST]]
    text = _class_table(rows[:_ROWS_SHOWN])
    if len(rows) > _ROWS_SHOWN:
        more = f"{count(len(rows) - _ROWS_SHOWN)} more classes"
        text += f"<details><summary>{more}</summary>{_class_table(rows[_ROWS_SHOWN:])}</details>"
    if len(classes) > len(rows):
        text += f'<p class="note">{count(len(classes) - len(rows))} classes with fewer mistakes are left out.</p>'
    return text


def _class_table(rows: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("Class", "Same pairs rejected", "Different pairs accepted", "Most often taken for")
    )
    return f'<table class="classes"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _class_row(row: ClassRow, most_accepted: float) -> str:
    confused = " ".join(
        f'<span>{name(other)} <span class="muted">{count(n)}</span></span>' for other, n in row.confused_with[:2]
    )
    images = f"{count(row.images)} image{'' if row.images == 1 else 's'}"
    accepted = _share_cell(row.accepted, row.different_pairs, most_accepted)
    return (
        f'<tr><th scope="row">{name(row.name)} <span class="muted images">{images}</span></th>'
        f'<td data-title="Same pairs rejected">{_share_cell(row.rejected, row.same_pairs, 1.0)}</td>'
        f'<td data-title="Different pairs accepted">{accepted}</td>'
        f'<td data-title="Most often taken for">{confused or NOTHING}</td></tr>'
    )


def _share(part: int, of: int) -> float:
    return part / of if of else 0.0


def _share_cell(part: int, of: int, full: float) -> str:
    if not of:
        return '<span class="muted">no such pair</span>'
    width = 100 * part / of / full
    return (
        f'<span class="share">{percent(part / of)}</span> <span class="muted">{count(part)} of {count(of)}</span>'
        '<svg class="bar-line" viewBox="0 0 100 3" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="3"/><rect class="bar wrong" width="{width:.1f}" height="3"/></svg>'
    )


def _slider(metrics: dict[str, Any], slider: dict[str, Any], positions: Sequence[tuple[str, int]]) -> str:
    presets = "".join(
        f'<button type="button" data-position="{position}" aria-pressed="false">{plain(label)}</button>'
        for label, position in positions
    )
    return (
        '<div id="slider-box" hidden><label for="slider">Threshold <output id="slider-value" for="slider">'
        f"{score(metrics['threshold'])}</output></label>"
        f'<input id="slider" type="range" min="0" max="{len(slider["thresholds"]) - 1}" step="1" '
        f'value="{slider["start"]}"><div class="presets">{presets}</div></div>'
    )


def _decisions(metrics: dict[str, Any]) -> str:
    """The confusion table and the rates at the threshold in use; the script changes them when the slider moves."""
    at = metrics["at_threshold"]

    def live(key: str, shown: str) -> str:
        return data(f"at_threshold/{key}", at[key], shown).replace("<data ", f'<data data-live="{key}" ', 1)

    def cell(key: str, look: str, word: str) -> str:
        return f'<td class="{look}">{live(key, count(at[key]))}<span>{word}</span></td>'

    def rate(key: str, title: str, digits: int | None = None) -> str:
        value = at[key]
        if value is None:
            shown = f'<data data-live="{key}" data-key="at_threshold/{key}" value="">{NOTHING}</data>'
        else:
            shown = live(key, percent(value) if digits is None else number(value, digits))
        return f"<div><dt>{title}</dt><dd>{shown}</dd></div>"

    note = "" if metrics["exact"] else '<p class="note">At other thresholds the counts come from a histogram.</p>'
    return (
        '<table class="decisions"><thead><tr><td></td><th scope="col">accepted</th><th scope="col">rejected</th></tr>'
        '</thead><tbody><tr><th scope="row">same pairs</th>'
        f"{cell('true_accepts', 'right', 'right')}{cell('false_rejects', 'wrong', 'false rejects')}</tr>"
        '<tr><th scope="row">different pairs</th>'
        f"{cell('false_accepts', 'wrong', 'false accepts')}{cell('true_rejects', 'right', 'right')}</tr>"
        "</tbody></table>"
        f'<dl class="rates">{rate("recall", "TAR (recall)")}{rate("far", "FAR")}{rate("accuracy", "Accuracy")}'
        f"{rate('precision', 'Precision')}{rate('f1', 'F1', 3)}{rate('mcc', 'MCC', 3)}</dl>{note}"
    )
