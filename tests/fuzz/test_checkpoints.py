from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import assert_clean, fuzz, inputs

pytestmark = pytest.mark.slow  # each child process imports PyTorch


def test_checkpoints_give_an_error_or_a_network(tmp_path: Path) -> None:
    count = inputs(1_000)
    report = fuzz("checkpoints:CheckpointBytes+CheckpointContents", tmp_path, count, seed=2)
    assert_clean(report)
    for target in ("CheckpointBytes", "CheckpointContents"):
        assert sum(n for name, n in report.outcomes.items() if name.startswith(f"{target}: builds")) > 2
        assert sum(n for name, n in report.outcomes.items() if name.startswith(f"{target}: CheckpointE")) > count / 8


@pytest.mark.parametrize(
    ("target", "what"), [("CheckpointBytes", "is not what was saved"), ("CheckpointContents", "code from the file ran")]
)
def test_without_its_guard_the_fault_is_noticed(tmp_path: Path, target: str, what: str) -> None:
    report = fuzz(f"checkpoints:{target}", tmp_path, 300, broken=True)
    assert any(what in finding.what for finding in report.findings)
