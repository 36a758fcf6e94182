from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import assert_clean, fuzz, inputs


@pytest.mark.parametrize(("target", "count"), [("CheckpointBytes", 400), ("CheckpointContents", 400)])
def test_checkpoints_give_an_error_or_a_network(tmp_path: Path, target: str, count: int) -> None:
    report = fuzz(f"checkpoints:{target}", tmp_path, count)
    assert_clean(report)
    assert sum(n for name, n in report.outcomes.items() if name.startswith("builds")) > 2
    assert sum(n for name, n in report.outcomes.items() if name.startswith("CheckpointError")) > count / 4


@pytest.mark.slow
@pytest.mark.parametrize(("target", "count"), [("CheckpointBytes", 1_000), ("CheckpointContents", 1_500)])
def test_many_checkpoints_give_an_error_or_a_network(tmp_path: Path, target: str, count: int) -> None:
    assert_clean(fuzz(f"checkpoints:{target}", tmp_path, inputs(count), seed=2))


@pytest.mark.parametrize(
    ("target", "what"), [("CheckpointBytes", "is not what was saved"), ("CheckpointContents", "code from the file ran")]
)
def test_without_its_guard_the_fault_is_noticed(tmp_path: Path, target: str, what: str) -> None:
    report = fuzz(f"checkpoints:{target}", tmp_path, 300, broken=True)
    assert any(what in finding.what for finding in report.findings)
