from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import assert_clean, fuzz, inputs

TARGETS = ("PairLists", "Results", "Baselines", "Keys")


def test_text_files_give_an_error_or_the_right_thing(tmp_path: Path) -> None:
    report = fuzz(f"texts:{'+'.join(TARGETS)}", tmp_path, 600)
    assert_clean(report)
    for target in TARGETS:
        assert sum(name.startswith(target) for name in report.outcomes) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_text_files_give_an_error_or_the_right_thing(tmp_path: Path, target: str) -> None:
    assert_clean(fuzz(f"texts:{target}", tmp_path, inputs(1_000), seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_without_its_guard_the_fault_is_noticed(tmp_path: Path, target: str) -> None:
    assert fuzz(f"texts:{target}", tmp_path, 300, broken=True).findings
