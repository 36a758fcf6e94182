"""metrics.json -> the words and figures of the report page: the answer in plain words, and every figure in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from siamese_deploy.metrics import REFERENCE_THRESHOLD
from siamese_deploy.report_page.confusions import ClassRow
from siamese_deploy.report_page.format import (
    NO_BREAK,
    NOTHING,
    count,
    data,
    far_power,
    name,
    number,
    percent,
    plain,
    score,
)

TITLE_FAR = "0.001"
"""The false accept rate (key of metrics.json) that the headline speaks of, where it can be stated."""

_Form = Callable[[float], str]
_four: _Form = partial(number, digits=4)


def at(metrics: dict[str, Any], key: str) -> Any:
    """The value at a place such as "at_threshold/far"; None where there is none."""
    value: Any = metrics
    for part in key.split("/"):
        value = None if value is None else value.get(part)
    return value


def interval(metrics: dict[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure."""
    bounds = at(metrics, f"intervals/{key}")
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))


def reason(metrics: dict[str, Any], key: str) -> str:
    """Why a figure is not there, in words."""
    reasons: dict[str, str] = metrics["not_computed"]
    return reasons.get(key) or reasons.get(key.split("/")[0]) or "it is not defined for these pairs"


def lead(metrics: dict[str, Any], classes: Sequence[ClassRow]) -> dict[str, str]:
    """The first words of the page: `basis`, `headline`, `in_use`, `failures` and `spread`."""
    stated = [far for far, tar in metrics["tar_at_far"].items() if tar is not None]
    if TITLE_FAR in stated:
        headline = _headline(metrics, TITLE_FAR)
    elif stated:
        headline = (
            f"{_headline(metrics, min(stated, key=float))}<small>{_far(TITLE_FAR)} cannot be "
            f"stated: {plain(reason(metrics, f'tar_at_far/{TITLE_FAR}'))}</small>"
        )
    else:
        why = plain(reason(metrics, f"tar_at_far/{TITLE_FAR}"))
        headline = f"No false accept rate can be stated<small>{why}</small>"
    basis = (
        f"{count(metrics['pairs'])} pairs of {count(metrics['images'])} images in {count(metrics['classes'])} classes"
    )
    if metrics["pairs_skipped"]:
        basis += f"; {count(metrics['pairs_skipped'])} pairs left out, because a picture cannot be read"
    return {
        "basis": basis,
        "headline": headline,
        "in_use": _in_use(metrics),
        "failures": _failures(classes),
        "spread": f", with 95{NO_BREAK}% intervals" if metrics["intervals"] else "",
    }


def _headline(metrics: dict[str, Any], far: str) -> str:
    key = f"tar_at_far/{far}"
    tar = metrics["tar_at_far"][far]
    return (
        f"At one false accept in{NO_BREAK}{count(round(1 / float(far)))} ({_far(far)}) it "
        f"accepts <strong>{data(key, tar, percent(tar))}</strong>{_bracket(metrics, key)} of same pairs"
    )


def _far(far: str) -> str:
    return f'<span class="whole">FAR {far_power(float(far))}</span>'


def _bracket(metrics: dict[str, Any], key: str) -> str:
    bounds = interval(metrics, key)
    if bounds is None:
        return ""
    low, high = (percent(bound, unit=False) for bound in bounds)
    return f' <span class="interval">[{low},{NO_BREAK}{high}]</span>'


def _in_use(metrics: dict[str, Any]) -> str:
    rates = []
    for key, words in (("recall", "of same pairs (TAR)"), ("far", "of different pairs (FAR)")):
        value = metrics["at_threshold"][key]
        if value is not None:
            place = f"at_threshold/{key}"
            rates.append(f"<b>{data(place, value, percent(value))}</b>{_bracket(metrics, place)} {words}")
    return (
        f"The threshold in use, <b>{data('threshold', metrics['threshold'], score(metrics['threshold']))}</b> "
        f"({plain(metrics['threshold_origin'])}), accepts {' and '.join(rates)}."
    )


def _failures(classes: Sequence[ClassRow]) -> str:
    """Where it fails, in a sentence for each kind of mistake."""
    lines = []
    rejected = max(classes, key=lambda row: row.rejected, default=None)
    if rejected is not None and rejected.rejected:
        lines.append(
            f'<a href="#classes">{name(rejected.name)}</a> has the most false rejects, {count(rejected.rejected)} of '
            f"its {count(rejected.same_pairs)} same pairs."
        )
    confused = max(((n, row.name, other) for row in classes for other, n in row.confused_with), default=None)
    if confused is not None:
        lines.append(
            f'<a href="#worst">{name(confused[1])} and {name(confused[2])}</a> are confused most: '
            f"{count(confused[0])} false accepts."
        )
    if not lines:
        return '<p class="fails">At it no pair is decided wrongly.</p>'
    return f'<p class="fails"><b>Where it fails:</b> {" ".join(lines)}</p>'


def cards(metrics: dict[str, Any]) -> str:
    """The headline figures."""
    shown: list[tuple[str, str, _Form]] = [
        ("roc_auc", "ROC AUC", _four),
        ("eer", "Equal error rate", percent),
        ("at_threshold/accuracy", "Accuracy, threshold in use", percent),
    ]
    if metrics["folds"]:
        shown.append(("folds/accuracy", f"Accuracy over {len(metrics['folds']['accuracies'])} folds", percent))
    elif metrics["one_shot"]:
        shown.append(("one_shot/accuracy", f"One-shot, {metrics['one_shot']['ways']} ways", percent))
    elif metrics["threshold"] != REFERENCE_THRESHOLD:
        shown.append(("accuracy", "Accuracy at 0.5", percent))
    else:
        shown.append(("average_precision", "Average precision", _four))
    return "".join(_card(metrics, *card) for card in shown)


def _card(metrics: dict[str, Any], key: str, title: str, form: _Form) -> str:
    value = at(metrics, key)
    if value is None:
        below, shown = plain(reason(metrics, key)), NOTHING
    else:
        below, shown = _below(metrics, key, form), data(key, value, form(value))
    return f'<div class="card"><p class="label">{title}</p><p class="value">{shown}</p><p class="sub">{below}</p></div>'


def _below(metrics: dict[str, Any], key: str, form: _Form) -> str:
    if key == "folds/accuracy":
        return f"standard error {percent(metrics['folds']['standard_error'])}"
    if key == "one_shot/accuracy":
        return f"{count(metrics['one_shot']['episodes'])} episodes"
    bounds = interval(metrics, key)
    return f"95{NO_BREAK}%: {form(bounds[0])} to {form(bounds[1])}" if bounds else ""


def figures_table(metrics: dict[str, Any]) -> str:
    """Every figure with its interval and what it means."""
    rows = [_row(metrics, *row) for row in _figures(metrics)]
    head = "".join(
        f'<th scope="col">{title}</th>' for title in ("Figure", "Value", f"95{NO_BREAK}% interval", "Meaning")
    )
    return (
        f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"{_method(metrics)}{_bounds(metrics)}"
    )


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str, _Form, str]]:
    """(place in metrics.json, title, form, meaning) of each row."""

    def threshold(key: str) -> str:
        value = at(metrics, key)
        return "" if value is None else f", at threshold {data(key, value, score(value))}"

    best = "flattering, as the threshold is chosen on these pairs" + threshold("best_accuracy_threshold")
    rows: list[tuple[str, str, _Form, str]] = [
        ("roc_auc", "ROC AUC", _four, "chance that a same pair scores above a different one"),
        ("average_precision", "Average precision", _four, "area under precision against recall"),
        ("eer", "Equal error rate", percent, "FAR where it equals FRR" + threshold("eer_threshold")),
    ]
    for far in metrics["tar_at_far"]:
        meaning = "share of same pairs accepted" + threshold(f"threshold_at_far/{far}")
        rows.append((f"tar_at_far/{far}", f"TAR at {_far(far)}", percent, meaning))
    rows += [
        ("accuracy", "Accuracy at 0.5", percent, "share of pairs decided rightly at 0.5, as the reference reports"),
        ("at_threshold/accuracy", "Accuracy, threshold in use", percent, "share of pairs decided rightly at it"),
        ("at_threshold/recall", "TAR, threshold in use", percent, "share of same pairs accepted at it"),
        ("at_threshold/far", "FAR, threshold in use", percent, "share of different pairs accepted at it"),
        ("at_threshold/precision", "Precision, threshold in use", percent, "share of accepted pairs that are same"),
        ("at_threshold/f1", "F1, threshold in use", _four, "harmonic mean of precision and TAR"),
        ("at_threshold/mcc", "MCC, threshold in use", _four, "correlation of decision and truth, from -1 to 1"),
        ("best_accuracy", "Best accuracy", percent, best),
        ("loss", "Loss", _four, "binary cross entropy in nats"),
        ("calibration/brier", "Brier score", _four, "mean squared difference of score and truth"),
        ("calibration/ece", "Expected calibration error", _four, "mean distance from the reliability line"),
    ]
    if metrics["folds"]:
        meaning = f"threshold chosen on the other folds; standard error {percent(metrics['folds']['standard_error'])}"
        rows.append(("folds/accuracy", "Accuracy over the folds", percent, meaning))
    if metrics["one_shot"]:
        meaning = f"{metrics['one_shot']['ways']} ways, {count(metrics['one_shot']['episodes'])} episodes"
        rows.append(("one_shot/accuracy", "One-shot accuracy", percent, meaning))
    return rows


def _row(metrics: dict[str, Any], key: str, title: str, form: _Form, meaning: str) -> str:
    value, bounds = at(metrics, key), interval(metrics, key)
    shown = NOTHING if value is None else data(key, value, form(value))
    if value is None:
        meaning = f"not computed: {plain(reason(metrics, key))}"
    between = "" if bounds is None else f"{form(bounds[0])} to {form(bounds[1])}"
    return (
        f'<tr><th scope="row">{title}</th><td class="number">{shown}</td><td class="number">{between}</td>'
        f'<td class="muted">{meaning}</td></tr>'
    )


def _method(metrics: dict[str, Any]) -> str:
    intervals = metrics["intervals"]
    if not intervals:
        why = metrics["not_computed"].get("intervals", "too few classes to draw from")
        return f'<p class="note">No intervals: {plain(why)}.</p>'
    return (
        f'<p class="note">Intervals: {plain(intervals["method"])}, {count(intervals["replicates"])} replicates of '
        f"{count(intervals['classes'])} classes. Classes are drawn, not pairs, because pairs that share a class are "
        "not independent.</p>"
    )


def _bounds(metrics: dict[str, Any]) -> str:
    if metrics["exact"]:
        return ""
    bounds = ", ".join(f"{plain(key)} {value:.2g}" for key, value in metrics["bounds"].items())
    return f'<p class="note">Computed from a histogram of scores; at most so far from the exact figure: {bounds}.</p>'


def run_facts(metrics: dict[str, Any]) -> str:
    """What ran, on what, how long it took, and what was left out."""
    run = metrics["run"]
    seconds, embed, pair = run["seconds"], run["embed_ms_per_image"], run["score_us_per_pair"]
    seed = "" if metrics["seed"] is None else f", seed {metrics['seed']}"
    pairs = (
        f"{data('pairs', metrics['pairs'], count(metrics['pairs']))}, of them "
        f"{data('same_pairs', metrics['same_pairs'], count(metrics['same_pairs']))} same "
        f"({plain(metrics['pair_scheme'])}{seed})"
    )
    left_out = f"{count(metrics['files_skipped'])} files, {count(metrics['pairs_skipped'])} pairs"
    per_image = "" if embed is None else f"{number(embed, 2)} ms per image; "
    images = f"{count(run['images_embedded'])} images, {count(run['images_from_cache'])} more from the cache"
    per_pair = "" if pair is None else f"{number(pair, 2)} µs per pair; "
    facts = [
        ("Pairs", pairs),
        ("Images", f"{count(metrics['images'])} in {count(metrics['classes'])} classes"),
        ("Left out", left_out + (" (see skipped.csv)" if metrics["files_skipped"] else "")),
        ("Embedding", f"{per_image}{number(seconds['embed'], 2)} s for {images}"),
        ("Scoring", f"{per_pair}{number(seconds['score'], 2)} s"),
        ("Runs on", f"{plain(metrics['provider'])} ({plain(run['runtime'])})"),
        ("Versions", ", ".join(f"{key} {plain(run[key])}" for key in ("siamese-toolkit", "python", "numpy", "pillow"))),
        ("Pair digest", f"<code>{plain(metrics['pair_digest'])}</code>"),
        ("Model digest", f"<code>{plain(metrics['model_digest'])}</code>"),
    ]
    rows = "".join(f"<div><dt>{title}</dt><dd>{value}</dd></div>" for title, value in facts)
    return f'<dl class="facts">{rows}</dl>'
