from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import RunCommand
from report_pages import HOSTILE, Page, make_page

from siamese_deploy.cli.eval import main as eval_main
from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.report_page.charts import Rates, roc_axes
from siamese_deploy.report_page.format import percent, score

VOID = {"meta", "img", "input", "br", "wbr"}
# In the page they are written as empty elements, closed in the same tag.
SELF_CLOSED = {"path", "rect", "circle", "polygon", "polyline"}


class Parsed(HTMLParser):
    """Holds that every element is closed in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.data: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.data.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSED
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside in ("script", "style"):
            self.content.setdefault(inside, []).append(text)
        else:
            self.words.append(text)
        if inside == "data":
            attributes, shown = self.data[-1]
            self.data[-1] = (attributes, shown + text)

    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name]


@pytest.fixture(scope="module")
def page() -> Page:
    return make_page()


@pytest.fixture(scope="module")
def parsed(page: Page) -> Parsed:
    return Parsed(page.text)


def embedded(parsed: Parsed, identity: str) -> dict[str, object]:
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    position = [attributes.get("id") for attributes in scripts].index(identity)
    assert scripts[position]["type"] == "application/json"
    return json.loads(parsed.content["script"][position])


def value_at(metrics: dict[str, Any], key: str) -> Any:
    value: Any = metrics
    for part in key.split("/"):
        value = value[part]
    return value


def test_the_first_sentence_answers_the_question(page: Page, parsed: Parsed) -> None:
    tar, (low, high) = page.metrics["tar_at_far"]["0.001"], page.metrics["intervals"]["tar_at_far"]["0.001"]
    words = parsed.text().replace("\u00a0", " ")
    assert (
        f"At one false accept in 1,000 (FAR 1e-3) it accepts {100 * tar:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of "
        "same pairs" in words
    )
    at = page.metrics["at_threshold"]
    recall = 100 * at["recall"]
    sentence = (
        f"The threshold in use, 0.83 (FAR 0.001 on the validation pairs), accepts {recall:.1f} % [{recall - 3.1:.1f}, "
        f"{recall + 2.9:.1f}] of same pairs (TAR) and {percent(at['far'])} [0, 3.0] of different pairs (FAR)."
    )
    assert sentence.replace("\u00a0", " ") in words
    assert re.search(r"Where it fails: class\d+ has the most false rejects, \d+ of its 190 same pairs\.", words)
    assert re.search(r"class\d+ and class\d+ are confused most: \d+ false accepts\.", words)


def test_every_figure_is_that_of_the_metrics(page: Page, parsed: Parsed) -> None:
    shown = set()
    for attributes, text in parsed.data:
        key = attributes["data-key"]
        assert key is not None
        value = value_at(page.metrics, key)
        assert json.loads(attributes["value"] or "") == value, key
        assert float(text.replace(",", "").replace("%", "")) == pytest.approx(
            value * (100 if "%" in text else 1), rel=0.01
        )
        shown.add(key)
    fars = ("0.1", "0.01", "0.001", "0.0001")
    assert shown == {
        *("pairs", "same_pairs", "loss", "accuracy", "roc_auc", "average_precision", "eer", "eer_threshold"),
        *("best_accuracy", "best_accuracy_threshold", "threshold", "calibration/brier", "calibration/ece"),
        *(f"{kind}/{far}" for kind in ("tar_at_far", "threshold_at_far") for far in fars),
        *(f"at_threshold/{key}" for key in page.metrics["at_threshold"]),
    }
    assert embedded(parsed, "metrics") == page.metrics
    words = parsed.text()
    for fact in (page.metrics["pair_digest"], page.metrics["model_digest"], "onnxruntime 1.32.0", "python 3.11.7"):
        assert fact in words
    for fact in (
        "2 files, 17 pairs (see skipped.csv)",
        "4.51 ms per image",
        "16.01 µs per pair",
        "3.52 s for 780 images",
    ):
        assert fact in words


def test_the_command_writes_it_with_the_figures_of_its_metrics(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run(eval_main, "-c", tiny_bundle, "-v", pictures, "-o", out, "--pairs", "all", "--images", "none")
    assert result.exit_code == 0, result.stderr
    metrics = json.loads((out / "metrics.json").read_bytes())
    parsed = Parsed((out / "report.html").read_text(encoding="utf-8"))
    assert embedded(parsed, "metrics") == metrics
    assert len(parsed.data) > 20
    for attributes, _ in parsed.data:
        assert json.loads(attributes["value"] or "null") == value_at(metrics, attributes["data-key"] or "")


def test_the_metrics_of_these_tests_are_like_the_real_ones(page: Page) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs" / "metrics.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(page.metrics, schema)


def test_nothing_is_loaded_from_anywhere(page: Page, parsed: Parsed) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.text.replace("data:image/jpeg;base64", ""))
    assert all(source.startswith("data:image/jpeg;base64,") for source in parsed.attributes("src"))
    assert all(link.startswith("#") for link in parsed.attributes("href"))
    identities = parsed.attributes("id")
    assert len(identities) == len(set(identities))
    assert {link[1:] for link in parsed.attributes("href")} <= set(identities)
    for _, attributes in parsed.tags:  # the policy forbids both
        assert not any(key.startswith("on") or key == "style" for key in attributes)


def test_the_policy_names_the_very_style_and_script(parsed: Parsed) -> None:
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind, text in (("style", parsed.content["style"][0]), ("script", parsed.content["script"][-1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy


def test_hostile_names_stay_text() -> None:
    page = make_page(9, 4, threshold=0.02, names=HOSTILE, threshold_origin="</script><script>alert(1)</script>")
    page.text.encode("utf-8")
    plain = Parsed(make_page(9, 4, threshold=0.02).text)
    hostile = Parsed(page.text)
    for tag in ("script", "img", "svg", "style", "b"):
        count = [t for t, _ in hostile.tags].count(tag)
        assert count == [t for t, _ in plain.tags].count(tag), tag
    assert hostile.attributes("onerror") == hostile.attributes("onload") == []
    words = hostile.text()
    for name in HOSTILE[:4]:
        assert name in words
    for shown in (r"\u202egnp.exe", r"line\nbreak\ttab\x00zero\x1besc", r"not utf-8 \udcff\udc80", "שלום"):
        assert shown in words
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f\x7f]", page.text)
    assert embedded(hostile, "metrics") == page.metrics


def test_a_rate_that_cannot_be_stated_is_said_with_its_reason() -> None:
    words = Parsed(make_page(5, 6).text).text().replace("\u00a0", " ")
    assert "At one false accept in 10 (FAR 1e-1) it accepts" in words
    assert "FAR 1e-3 cannot be stated: a false accept rate of 0.001 needs 10,000 different pairs" in words
    assert "Shaded: too few different pairs to tell" in words
    assert "Shaded" not in Parsed(make_page().text).text()


@pytest.mark.parametrize("only", [True, False])
def test_one_kind_of_pair_is_a_page_too(only: bool) -> None:
    page = make_page(5, 6, threshold=0.1, only=only)
    parsed = Parsed(page.text)
    words = parsed.text()
    assert "No false accept rate can be stated" in words
    assert "not computed: needs pairs of both kinds" in words
    assert "No ROC and DET curve" in words
    assert ("No different pair was accepted." in words) == only
    assert embedded(parsed, "metrics") == page.metrics


def test_a_perfect_network_is_a_page_too() -> None:
    page = make_page(6, 10, threshold=1.0, intervals=None)
    words = Parsed(page.text).text()
    assert "No different pair was accepted." in words
    assert "No intervals: " in words
    assert "[" not in words.split("same pairs")[0]


@pytest.mark.parametrize(("classes", "in_details", "left_out"), [(30, 0, 0), (39, 9, 0), (1003, 970, 3)])
def test_thirty_classes_are_shown_and_the_rest_on_demand(classes: int, in_details: int, left_out: int) -> None:
    text = make_page(classes, 2, only=True).text if classes > 100 else make_page(classes, 4).text
    shown, _, more = text.partition("<details>")
    assert shown.count('<th scope="row"><bdi>') == 30 or in_details == 0
    assert more.partition("</details>")[0].count('<th scope="row"><bdi>') == in_details
    assert (f"{left_out} classes with fewer mistakes are left out" in text) == (left_out > 0)


def test_slider_thresholds_are_counted_exactly() -> None:
    page = make_page(16, 20)
    parsed = Parsed(page.text)
    data = embedded(parsed, "slider-data")
    thresholds = data["thresholds"]
    assert isinstance(thresholds, list)
    assert thresholds == sorted(set(thresholds))
    assert 400 < len(thresholds) < 1200
    for k, threshold in enumerate(thresholds):
        counted = page.decisions(threshold)
        assert (data["same"][k], data["different"][k]) == (counted["true_accepts"], counted["false_accepts"])
    start = data["start"]
    assert thresholds[start] == page.metrics["threshold"]
    at = page.metrics["at_threshold"]
    assert (data["same"][start], data["different"][start]) == (at["true_accepts"], at["false_accepts"])
    stated = {*filter(None, page.metrics["threshold_at_far"].values()), page.metrics["eer_threshold"], 0.83}
    assert stated <= set(thresholds)
    # The FAR can be set finely wherever it can be resolved: no step of more than a tenth of itself.
    far = np.array(data["different"]) / data["different"][0]
    far = far[far >= 1e-3]
    assert (far[1:] / far[:-1]).min() > 0.8
    assert [attributes["aria-pressed"] for tag, attributes in parsed.tags if tag == "button"] == ["false"] * 6


def test_a_histogram_shows_the_metrics_at_the_threshold_in_use() -> None:
    page = make_page(histogram=True)
    parsed = Parsed(page.text)
    data = embedded(parsed, "slider-data")
    assert data["same"][data["start"]] == page.metrics["at_threshold"]["true_accepts"]
    words = parsed.text()
    assert "Computed from a histogram of scores; at most so far from the exact figure: " in words
    assert "At other thresholds the counts come from a histogram." in words


def test_folds_and_one_shot_have_their_figures() -> None:
    folds = {"accuracy": 0.9123, "standard_error": 0.0041, "accuracies": [0.9] * 10}
    words = Parsed(make_page(6, 6, folds=folds).text).text().replace("\u00a0", " ")
    for shown in ("Accuracy over 10 folds", "91.2 %", "standard error 0.41 %"):
        assert shown in words
    one_shot = {"ways": 20, "episodes": 400, "accuracy": 0.8766}
    words = Parsed(make_page(6, 6, one_shot=one_shot).text).text().replace("\u00a0", " ")
    assert "20 ways, 400 episodes" in words
    assert "87.7 %" in words


def test_the_drawn_curve_is_short_and_stays_with_the_true_one() -> None:
    page = make_page()
    rates = Rates.of(ScoreCounts.of(page.scores, page.is_same))
    assert rates is not None
    drawn = re.search(r'<polyline class="curve" points="([^"]+)"', page.text)
    assert drawn is not None
    line = np.array([point.split(",") for point in drawn[1].split()], float)
    assert len(line) < 900
    true = np.stack(roc_axes(rates).at(*rates.resolved()), axis=1)[::50]
    start, step = line[:-1], np.diff(line, axis=0)
    along = ((true[:, None] - start) * step).sum(-1) / (step**2).sum(-1)
    nearest = start + np.clip(along, 0, 1)[..., None] * step
    assert np.hypot(*(nearest - true[:, None]).T).min(axis=0).max() < 0.5


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0, "0"),
        (1, "100"),
        (0.174, "17.4"),
        (0.0625, "6.3"),
        (0.00098, "0.098"),
        (0.0000123, "0.0012"),
        (0.99971, "99.971"),
    ],
)
def test_percent_has_digits_where_they_matter(share: float, shown: str) -> None:
    assert percent(share) == f"{shown}\u00a0%"


def test_a_score_has_no_needless_digits() -> None:
    assert [score(value) for value in (0.5, 1.0, 0.0, 1e-7, 0.1234567)] == ["0.5", "1", "0", "0", "0.123457"]


def test_the_page_is_small() -> None:
    page = make_page()
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.text)
    assert len(without_pictures) < 150_000
