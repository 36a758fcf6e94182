"""Names and numbers -> the text of the report page.

The page's script formats with the same rules (page.js), so that a figure does not change its look, or its last
digit, when the slider has been moved away and back.
"""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Decimal
from html import escape

from siamese_deploy.errors import one_line

NO_BREAK = "\u00a0"
NOTHING = "\u2013"
"""In place of a figure that there is not."""


def plain(text: object) -> str:
    """Any text as HTML text: escaped, and what is invisible or turns the writing direction is shown as its code."""
    return escape(one_line(str(text)))


def name(text: str) -> str:
    """A file or class name as HTML; one in a right-to-left script leaves the words around it where they are."""
    return f"<bdi>{plain(text)}</bdi>"


def number(value: float, digits: int) -> str:
    """`digits` decimals; a half is rounded up, as JavaScript does."""
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):f}"


def percent(share: float, unit: bool = True) -> str:
    """A share in [0, 1]: 17.4 %, 0.098 %, 99.97 %; more digits near 0 and 100, and those two only when exact."""
    value = 100 * share
    rest = min(value, 100 - value)
    digits = 0 if rest == 0 else 1 if rest >= 1 else 2 if rest >= 0.1 else 3 if rest >= 0.01 else 4
    return number(value, digits) + (f"{NO_BREAK}%" if unit else "")


def score(value: float) -> str:
    """A score or threshold with 6 decimals at most."""
    return number(value, 6).rstrip("0").rstrip(".")


def count(value: int) -> str:
    return f"{value:,}"


def far_power(far: float) -> str:
    """0.001 -> 1e-3."""
    mantissa, exponent = f"{far:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def data(key: str, value: float | int, shown: str) -> str:
    """`shown`, with the value itself for machines: `key` is its place in metrics.json, such as tar_at_far/0.001."""
    return f'<data data-key="{escape(key)}" value="{json.dumps(value)}">{shown}</data>'


def json_script(identity: str, content: object) -> str:
    """A data block that scripts can read; nothing in it can end it."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{text}</script>'
