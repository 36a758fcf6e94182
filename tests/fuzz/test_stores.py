from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import assert_clean, fuzz, inputs

TARGETS = ("Galleries", "Caches")


def test_damaged_stores_give_an_error_or_the_right_answer(tmp_path: Path) -> None:
    report = fuzz("stores:Galleries+Caches", tmp_path, 100)
    assert_clean(report)
    for target in TARGETS:
        assert sum(name.startswith(target) for name in report.outcomes) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_damaged_stores_give_an_error_or_the_right_answer(tmp_path: Path, target: str) -> None:
    assert_clean(fuzz(f"stores:{target}", tmp_path, inputs(300), seed=2))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "what"), [("Galleries", "Candidate(name="), ("Caches", "another vector")])
def test_a_store_that_believes_its_file_is_noticed(tmp_path: Path, target: str, what: str) -> None:
    report = fuzz(f"stores:{target}", tmp_path, 400, broken=True)
    assert any(what in finding.what for finding in report.findings)
