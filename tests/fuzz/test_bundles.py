from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.bundles import NAMES, BundleBytes
from fuzz.driver import assert_clean, fuzz, inputs


def test_bundles_are_refused_before_anything_runs_or_give_scores(tmp_path: Path) -> None:
    report = fuzz("bundles:BundleBytes+BundleGraphs+Manifests", tmp_path, 600)
    assert_clean(report)
    of_bytes = {name for name in report.outcomes if name.startswith("BundleBytes")}
    assert of_bytes == {"BundleBytes: BundleError"}
    assert min(report.outcomes["BundleGraphs: runs"], report.outcomes["Manifests: read, runs"]) > 2
    assert min(report.outcomes["BundleGraphs: BundleError"], report.outcomes["Manifests: BundleError"]) > 50


@pytest.mark.slow
def test_every_byte_and_every_length_of_a_bundle(tmp_path: Path, tiny_bundle: Path) -> None:
    total = BundleBytes.total({name: (tiny_bundle / name).read_bytes() for name in NAMES})
    report = fuzz("bundles:BundleBytes", tmp_path, total)
    assert_clean(report)
    assert report.outcomes["BundleBytes: BundleError"] >= total


@pytest.mark.slow
@pytest.mark.parametrize("target", ["BundleGraphs", "Manifests"])
def test_many_bundles_with_right_hashes_give_an_error_or_scores(tmp_path: Path, target: str) -> None:
    assert_clean(fuzz(f"bundles:{target}", tmp_path, inputs(1_000), seed=2))


@pytest.mark.slow
def test_a_bundle_whose_hashes_nobody_compares_is_noticed(tmp_path: Path) -> None:
    report = fuzz("bundles:BundleBytes", tmp_path, 200, broken=True)
    assert any("runs" in finding.what for finding in report.findings)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["BundleGraphs", "Manifests"])
def test_errors_of_libraries_that_come_through_are_noticed(tmp_path: Path, target: str) -> None:
    assert fuzz(f"bundles:{target}", tmp_path, 200, broken=True).findings
