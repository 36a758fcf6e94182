"""The report page in headless Chromium: what only a browser can tell."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, Page, make_page

from siamese_deploy.report_page.format import percent, score

pytestmark = pytest.mark.browser

ARROW_RIGHT, ARROW_LEFT, HOME, END = "\ue014", "\ue012", "\ue011", "\ue010"  # WebDriver's codes of the keys


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Open:
    """Open a page's text at a width in pixels, light or dark; the logs begin with it."""

    def open_page(text: str, width: int = 1280, *, dark: bool = False, media: str = "", scripts: bool = True) -> Any:
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 700}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.get("about:blank")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": scheme})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(file.as_uri())
        return browser

    return open_page


@pytest.fixture(scope="module")
def page() -> Page:
    return make_page()


def element(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def live(browser: Any) -> dict[str, str]:
    found = browser.find_elements("css selector", "[data-live]")
    return {each.get_attribute("data-live"): each.get_property("textContent") for each in found}


def as_shown(page: Page, threshold: float) -> dict[str, str]:
    """The table of decisions at a threshold, computed from the scores and not from the page."""
    counts = page.decisions(threshold)
    ta, fa, tr, fr = (counts[key] for key in ("true_accepts", "false_accepts", "true_rejects", "false_rejects"))
    shares = {
        "accuracy": (ta + tr, ta + fa + tr + fr),
        "precision": (ta, ta + fa),
        "recall": (ta, ta + fr),
        "far": (fa, fa + tr),
    }
    product = (ta + fa) * (ta + fr) * (tr + fa) * (tr + fr)
    return {
        **{key: f"{value:,}" for key, value in counts.items()},
        **{key: percent(part / whole) if whole else "\u2013" for key, (part, whole) in shares.items()},
        "f1": f"{2 * ta / (2 * ta + fa + fr):.3f}",
        "mcc": f"{(ta * tr - fa * fr) / product**0.5:.3f}" if product else "\u2013",
    }


def test_it_opens_without_an_error_and_asks_for_nothing(opened: Open, page: Page) -> None:
    browser = opened(page.text)
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [e["params"]["request"]["url"] for e in asked if e["method"] == "Network.requestWillBeSent"]
    others = [address for address in addresses if not address.startswith("data:")]
    assert [address.rpartition("/")[2] for address in others] == ["report.html"]
    drawn = browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert drawn is True


def test_a_script_that_is_not_ours_is_stopped_and_seen(opened: Open, page: Page) -> None:
    # Negative control of the test above and of the hostile names below.
    added = "<script>document.title='hacked'</script><img src='file:///x.png' onerror=\"document.title='hacked'\">"
    browser = opened(page.text.replace("</body>", f"{added}</body>"))
    assert browser.title != "hacked"
    assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) >= 2
    browser = opened(re.sub("<meta http-equiv[^>]+>", "", page.text).replace("</body>", f"{added}</body>"))
    assert browser.title == "hacked"


def test_hostile_names_do_not_run_even_without_the_policy(opened: Open) -> None:
    text = make_page(9, 4, threshold=0.02, names=HOSTILE, threshold_origin=HOSTILE[0]).text
    browser = opened(re.sub("<meta http-equiv[^>]+>", "", text))
    assert browser.title.startswith("Verification report")
    assert browser.get_log("browser") == []
    assert "<img src=x onerror=document.title='hacked'>" in element(browser, "#classes").text


def test_it_begins_with_the_numbers_of_the_metrics(opened: Open, page: Page) -> None:
    browser = opened(page.text)
    assert live(browser) == as_shown(page, page.metrics["threshold"])
    values = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('[data-live]')].map(e => [e.dataset.live, +e.value]))"
    )
    assert values == page.metrics["at_threshold"]
    assert element(browser, "#slider-value").text == "0.83"
    assert element(browser, "button[aria-pressed=true]").text == "in use"


def test_the_slider_obeys_the_keyboard_and_counts_right(opened: Open, page: Page) -> None:
    browser = opened(page.text)
    slider, data = (
        element(browser, "#slider"),
        json.loads(element(browser, "#slider-data").get_attribute("textContent")),
    )
    start = data["start"]
    marks = [element(browser, f"#mark-{name}").get_attribute("transform") for name in ("histogram", "roc", "det")]
    for keys, position in (
        (ARROW_RIGHT * 3, start + 3),
        (ARROW_LEFT * 8, start - 5),
        (HOME, 0),
        (END, len(data["thresholds"]) - 1),
    ):
        slider.send_keys(keys)
        threshold = data["thresholds"][position]
        assert element(browser, "#slider-value").text == score(threshold)
        assert live(browser) == as_shown(page, threshold), position
        assert slider.get_attribute("aria-valuetext").startswith(f"threshold {score(threshold)}, accepts ")
    moved = [element(browser, f"#mark-{name}").get_attribute("transform") for name in ("histogram", "roc", "det")]
    assert all(one != other for one, other in zip(marks, moved, strict=True))
    element(browser, "button[data-position]").click()
    assert live(browser) == as_shown(page, page.metrics["threshold"])
    assert [element(browser, f"#mark-{n}").get_attribute("transform") for n in ("histogram", "roc", "det")] == marks
    by_text = {button.text: button for button in browser.find_elements("css selector", "button")}
    assert list(by_text) == ["in use", "FAR 1e-1", "FAR 1e-2", "FAR 1e-3", "FAR 1e-4", "EER", "best accuracy"]
    by_text["FAR 1e-3"].click()
    assert live(browser)["recall"] == percent(page.metrics["tar_at_far"]["0.001"])
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [320, 360, 390, 700, 1280])
def test_nothing_is_wider_than_the_screen(opened: Open, width: int) -> None:
    long = ("x" * 200, "<img src=x onerror=document.title='hacked'>" * 4, "long_words_" * 18)
    browser = opened(make_page(39, 20, threshold=0.02, names=long).text, width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Charts neither cut off their words nor let them run out of the drawing.
    outside = browser.execute_script("""
        return [...document.querySelectorAll('svg text')].filter((text) => {
          const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
          return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
        }).map((text) => text.textContent);
    """)
    assert outside == []


CONTRASTS = """
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const e of document.querySelectorAll('body *')) {
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words || !e.getClientRects().length) continue;
    const ink = e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color;
    const [one, other] = [parse(ink), background(e)].map(luminance);
    found[`${ink} ${e.tagName} ${e.getAttribute('class')}`] =
      (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }
  return [found, background(document.body)];
"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_word_can_be_read_in_both_themes(opened: Open, page: Page, dark: bool) -> None:
    browser = opened(page.text, dark=dark)
    contrasts, (red, *_) = browser.execute_script(CONTRASTS)
    assert (red < 64) == dark
    assert len(contrasts) > 20
    assert {what: ratio for what, ratio in contrasts.items() if ratio < 4.5} == {}


def test_without_scripts_the_numbers_and_charts_are_there(opened: Open, page: Page) -> None:
    browser = opened(page.text, scripts=False)
    try:
        text = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
        nodes = browser.execute_cdp_cmd("DOM.getDocument", {"depth": -1})["root"]["nodeId"]
        found = browser.execute_cdp_cmd(
            "DOM.querySelectorAll", {"nodeId": nodes, "selector": "#slider-box:not([hidden])"}
        )
        assert found["nodeIds"] == []
        whole = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert text.startswith(b"%PDF")
    said = [node["name"]["value"] for node in whole["nodes"] if not node["ignored"] and "name" in node]
    for shown in as_shown(page, 0.83).values():
        assert shown in said
    assert sum(node.get("role", {}).get("value") == "image" for node in whole["nodes"]) >= 5 + 24
    assert "Threshold" not in " ".join(said).split("Scores and threshold")[-1].split("accepted")[0]


def test_it_prints_light_on_few_pages(opened: Open, page: Page) -> None:
    browser = opened(page.text, 690, dark=True, media="print")
    _, background = browser.execute_script(CONTRASTS)
    assert background == [255, 255, 255]
    assert not element(browser, "#slider-box").is_displayed()
    paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"])
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
