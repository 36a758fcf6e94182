"""Every row of docs/faults.md names tests that exist and run, or says why there is nothing to test here."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/faults.md").read_text("utf-8")
ROWS = {
    f"{section}{k}" for section, last in zip("ABCDE", (43, 24, 21, 47, 14), strict=True) for k in range(1, last + 1)
}
WITHOUT_A_TEST = {"D43", "D44", "D45", "D46", "D47", "E14"}
"""There is no HTTP service of ours."""
_REASON = "not here: "
_TESTS = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`(?:, (?!$)|$)")


def problems(page: str) -> list[str]:
    """What is wrong with the rows of the page, a sentence each."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in page.splitlines()
        if re.match(r"\| [A-E]\d", line)
    ]
    counts = Counter(row[0] for row in rows)
    found = [f"{name}: {counts[name]} rows" for name in sorted(ROWS | counts.keys()) if counts[name] != (name in ROWS)]
    for row in rows:
        found += [f"{row[0]}: {problem}" for problem in _problems_of_row(row)]
    return found


def _problems_of_row(row: list[str]) -> Iterator[str]:
    if len(row) != 4 or not all(row):
        yield "expected four cells with something in them"
        return
    name, *_, tests = row
    if tests.startswith(_REASON):
        if name not in WITHOUT_A_TEST:
            yield "has to have a test"
        if not tests.removeprefix(_REASON).strip():
            yield "no reason"
        return
    if _TESTS.sub("", tests):
        yield f"expected names of tests with commas between, or '{_REASON}' and the reason, got {tests!r}"
    for file, test in _TESTS.findall(tests):
        if not (ROOT / file).is_file():
            yield f"{file}: no such file"
        elif why := why_it_never_runs((ROOT / file).read_text("utf-8"), test):
            yield f"{file}: {test}: {why}"


def why_it_never_runs(source: str, test: str) -> str | None:
    """Why the test `test` of a file with this source is none; None: it is one."""
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test]
    if not functions:
        return "no such test"
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and _named(node.targets[0], "pytestmark")]
    first = next(node for node in functions[-1].body if not _is_text(node))
    if any(map(_always_skips, [*marks, *functions[-1].decorator_list])):
        return "always skipped"
    if isinstance(first, ast.Expr) and ast.unparse(first).startswith(("pytest.skip(", "pytest.xfail(")):
        return "always skipped"
    return None


def _always_skips(mark: ast.expr) -> bool:
    text = ast.unparse(mark)
    return bool(re.search(r"\bmark\.(skip|xfail)\b|\bmark\.skipif\((True|1)\b", text))


def _named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_every_fault_is_tested_or_has_a_reason() -> None:
    assert problems(PAGE) == []


# --- the check itself ----------------------------------------------------------------------------------------------

GOOD = "`tests/test_faults.py::test_a_planted_fault_of_the_page_is_found`"
WHOLE = "".join(
    f"| {name} | fault | answer | {'not here: no server' if name in WITHOUT_A_TEST else GOOD} |\n"
    for name in sorted(ROWS)
)
A7 = f"| A7 | fault | answer | {GOOD} |\n"


def test_a_page_without_faults_has_none() -> None:
    assert problems(WHOLE) == []
    assert problems(WHOLE.replace(A7, A7.replace(GOOD, f"{GOOD}, {GOOD}").replace("answer", r"a \| b"))) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "A7: 0 rows"),
        (A7 + A7, "A7: 2 rows"),
        (A7 + A7.replace("A7", "A44"), "A44: 1 rows"),
        (A7.replace(GOOD, ""), "A7: expected four cells"),
        (A7.replace("answer", ""), "A7: expected four cells"),
        (A7.replace(" | answer", ""), "A7: expected four cells"),
        (A7.replace(GOOD, "not here: too hard"), "A7: has to have a test"),
        (A7.replace(GOOD, "somebody will"), "A7: expected names of tests"),
        (A7.replace(GOOD, f"{GOOD} and more"), "A7: expected names of tests"),
        (A7.replace(GOOD, f"{GOOD}, "), "A7: expected names of tests"),
        (A7.replace("test_faults.py", "test_gone.py"), "tests/test_gone.py: no such file"),
        (A7.replace("::test_a_", "::test_no_"), "no such test"),
    ],
)
def test_a_planted_fault_of_the_page_is_found(row: str, words: str) -> None:
    found = problems(WHOLE.replace(A7, row))
    assert len(found) == 1
    assert words in found[0]


def test_a_reason_must_be_one() -> None:
    assert problems(WHOLE.replace("not here: no server", "not here:", 1)) != []


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def test_x():\n    assert f()", None),
        ("@pytest.mark.slow\ndef test_x():\n    assert f()", None),
        ("@pytest.mark.skipif(os.geteuid() == 0, reason='root')\ndef test_x():\n    assert f()", None),
        ("def test_x():\n    'text'\n    if f():\n        pytest.skip('none here')\n    assert g()", None),
        ("def test_y():\n    assert f()", "no such test"),
        ("def f():\n    def test_x():\n        pass", "no such test"),
        ("@pytest.mark.skip\ndef test_x():\n    assert f()", "always skipped"),
        ("@pytest.mark.skip(reason='later')\ndef test_x():\n    assert f()", "always skipped"),
        ("@pytest.mark.skipif(True, reason='later')\ndef test_x():\n    assert f()", "always skipped"),
        ("@pytest.mark.xfail\ndef test_x():\n    assert f()", "always skipped"),
        ("pytestmark = pytest.mark.skip\ndef test_x():\n    assert f()", "always skipped"),
        ("def test_x():\n    'text'\n    pytest.skip('later')", "always skipped"),
    ],
)
def test_a_test_that_never_runs_is_none(source: str, why: str | None) -> None:
    assert why_it_never_runs(source, "test_x") == why
