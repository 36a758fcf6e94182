from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.bundles import NAMES, BundleBytes
from fuzz.driver import assert_clean, fuzz, inputs


@pytest.fixture(scope="module")
def total(tiny_bundle: Path) -> int:
    return BundleBytes.total({name: (tiny_bundle / name).read_bytes() for name in NAMES})


def test_a_thousand_damaged_bundles_are_refused_before_anything_runs(tmp_path: Path) -> None:
    report = fuzz("bundles:BundleBytes", tmp_path, 1000)
    assert_clean(report)
    assert set(report.outcomes) == {"BundleError"}


@pytest.mark.slow
def test_every_byte_and_every_length_of_a_bundle(tmp_path: Path, total: int) -> None:
    report = fuzz("bundles:BundleBytes", tmp_path, total)
    assert_clean(report)
    assert report.outcomes["BundleError"] >= total


def test_a_bundle_whose_hashes_nobody_compares_is_noticed(tmp_path: Path) -> None:
    report = fuzz("bundles:BundleBytes", tmp_path, 200, broken=True)
    assert any("runs" in finding.what for finding in report.findings)


@pytest.mark.parametrize(("target", "count"), [("BundleGraphs", 250), ("Manifests", 300)])
def test_bundles_with_right_hashes_give_an_error_or_scores(tmp_path: Path, target: str, count: int) -> None:
    report = fuzz(f"bundles:{target}", tmp_path, count)
    assert_clean(report)
    assert report.outcomes["runs"] + report.outcomes["read, runs"] > 2
    assert report.outcomes["BundleError"] > count / 4


@pytest.mark.slow
@pytest.mark.parametrize(("target", "count"), [("BundleGraphs", 2_000), ("Manifests", 2_000)])
def test_many_bundles_with_right_hashes_give_an_error_or_scores(tmp_path: Path, target: str, count: int) -> None:
    assert_clean(fuzz(f"bundles:{target}", tmp_path, inputs(count), seed=2))


@pytest.mark.parametrize("target", ["BundleGraphs", "Manifests"])
def test_errors_of_libraries_that_come_through_are_noticed(tmp_path: Path, target: str) -> None:
    assert fuzz(f"bundles:{target}", tmp_path, 200, broken=True).findings
