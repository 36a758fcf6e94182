from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from planted_faults import FAULTS, clean_folder, drawing, encoded, no_faults

from siamese_deploy.dataset_check.check import DatasetReport, check_dataset
from siamese_deploy.dataset_check.findings import KINDS
from siamese_deploy.dataset_check.perceptual_hash import close_pairs, perceptual_hasher
from siamese_deploy.dataset_check.quick import quick_findings, quick_line
from siamese_deploy.errors import EnvironmentFault, InputDataError
from siamese_deploy.image_folder import scan_image_folder

ROWS = {f"A{row}" for row in range(1, 38)}
NOTHING_TO_FIND = {"A16", "A17", "A19", "A23"}
TESTED_BY_NAME = {"A1", "A2", "A35", "A36", "A37"}


@pytest.fixture(scope="session")
def _clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_folder(tmp_path_factory.mktemp("clean") / "pictures")


@pytest.fixture
def pictures(tmp_path: Path, _clean: Path) -> Path:
    return Path(shutil.copytree(_clean, tmp_path / "pictures"))


def codes(report: DatasetReport) -> set[str]:
    return {finding.code for finding in report.findings}


def paths_of(report: DatasetReport, code: str) -> set[str]:
    return {path for finding in report.findings if finding.code == code for path in finding.paths}


def test_a_clean_folder_gives_no_finding(pictures: Path) -> None:
    report = check_dataset(pictures)
    assert report.findings == ()
    assert report.exit_code(strict=True) == 0
    assert report.folders[0].summary()["usable"] == 16


def test_what_is_no_fault_gives_no_finding(pictures: Path) -> None:
    no_faults(pictures)
    assert check_dataset(pictures).findings == ()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's, which commands silence
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_found_under_its_code_and_no_other(pictures: Path, name: str) -> None:
    fault = FAULTS[name]
    fault.plant(pictures)
    report = check_dataset(pictures)
    assert codes(report) == fault.codes, report.findings
    if fault.path:
        assert str(pictures / fault.path) in set().union(*(paths_of(report, code) for code in fault.codes))
    assert all(finding.message and not finding.message[0].isspace() for finding in report.findings)
    worst = {KINDS[code].severity for code in fault.codes}
    assert report.exit_code() == (11 if "error" in worst else 0)
    assert report.exit_code(strict=True) == (11 if worst - {"note"} else 0)


def test_every_row_of_the_catalogue_is_decided() -> None:
    assert {fault.row for fault in FAULTS.values()} - {"flat"} | NOTHING_TO_FIND | TESTED_BY_NAME == ROWS
    found = set().union(*(fault.codes for fault in FAULTS.values()))
    assert set(KINDS) - found == {"leakage", "near-leakage", "same-folder", "shared-class", "unread-folder", "not-run"}
    table = (Path(__file__).parents[2] / "docs/check.md").read_text("utf-8")
    for row in ROWS:
        assert f"| {row} |" in table
    for code, kind in KINDS.items():
        assert f"| `{code}` | {kind.severity} |" in table


def test_a_folder_that_is_missing_a_file_or_empty(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        with pytest.raises(InputDataError, match=name):
            check_dataset(tmp_path / name)
        with pytest.raises(InputDataError, match=name):
            check_dataset(pictures, tmp_path / name)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything: it has to stop being root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_no_permission(pictures: Path) -> None:
    check_dataset(pictures)  # whatever has to be imported is imported while it may be
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in a folder of the user's own
        root = Path(folder, "pictures")
        shutil.copytree(pictures, root)
        root.parent.chmod(0o755)
        (root / "apple/0.png").chmod(0)
        (root / "bolt").chmod(0)
        try:
            with as_nobody():
                report = check_dataset(root)
            assert codes(report) == {"unreadable", "unread-folder"}
            assert paths_of(report, "unreadable") == {str(root / "apple/0.png")}
            assert paths_of(report, "unread-folder") == {str(root / "bolt")}
            root.chmod(0)
            with as_nobody(), pytest.raises(EnvironmentFault, match="permission"):
                check_dataset(root)
        finally:
            root.chmod(0o755)
            (root / "bolt").chmod(0o755)


# --- two folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """Classes and pictures of its own."""
    root = tmp_path / "val"
    for name, character in (("egg", 30), ("fork", 31)):
        (root / name).mkdir(parents=True)
        for k in range(3):
            (root / name / f"{k}.png").write_bytes(encoded(drawing(character, k), "PNG"))
    return root


def test_two_folders_that_share_nothing(pictures: Path, val: Path) -> None:
    report = check_dataset(pictures, val)
    assert report.findings == ()
    assert [checked.summary()["classes"] for checked in report.folders] == [4, 2]


def test_the_same_picture_in_both_folders(pictures: Path, val: Path) -> None:
    shutil.copy(pictures / "apple/0.png", val / "egg/copied.png")
    Image.open(pictures / "bolt/1.png").convert("RGB").save(val / "fork/saved.tiff")
    report = check_dataset(pictures, val)
    assert codes(report) == {"leakage"}
    assert [finding.paths for finding in report.findings] == [
        (str(pictures / "apple/0.png"), str(val / "egg/copied.png")),
        (str(pictures / "bolt/1.png"), str(val / "fork/saved.tiff")),
    ]
    assert report.findings[0].message.startswith("the same file content")
    assert report.findings[1].message.startswith("the same pixels in different files")
    assert report.exit_code() == 11


def test_almost_the_same_picture_in_both_folders(pictures: Path, val: Path) -> None:
    Image.open(pictures / "apple/0.png").convert("RGB").save(val / "egg/saved.jpg", quality=80)
    report = check_dataset(pictures, val)
    assert codes(report) == {"near-leakage"}
    assert paths_of(report, "near-leakage") == {str(pictures / "apple/0.png"), str(val / "egg/saved.jpg")}
    assert report.exit_code() == 0


@pytest.mark.parametrize("name", ["apple", "APPLE"])
def test_a_class_of_both_folders(pictures: Path, val: Path, name: str) -> None:
    (val / "egg").rename(val / name)
    report = check_dataset(pictures, val)
    assert codes(report) == {"shared-class"}
    assert paths_of(report, "shared-class") == {str(pictures / "apple"), str(val / name)}


def test_one_folder_under_two_names(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(pictures)
    report = check_dataset(pictures, tmp_path / "other")
    assert codes(report) == {"same-folder"}
    assert report.exit_code() == 11
    assert len(report.folders) == 1


def test_faults_of_the_other_folder_are_found(pictures: Path, val: Path) -> None:
    (val / "egg/zero.png").touch()
    shutil.copy(val / "egg/0.png", val / "fork/copy.png")
    report = check_dataset(pictures, val)
    assert codes(report) == {"unreadable", "label-conflict"}


# --- near duplicates -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(0, 63), max_size=20)), max_size=30),
    st.integers(0, 16),
)
def test_close_pairs_are_those_of_comparing_all(
    seeds: list[int], changes: list[tuple[int, list[int]]], distance: int
) -> None:
    values = list(seeds)
    for k, bits in changes:
        if k < len(seeds):
            values.append(seeds[k] ^ sum(1 << bit for bit in set(bits)))
    found = []
    for left, right, bits in close_pairs(np.array(values, dtype=np.uint64), distance):
        found += list(zip(left.tolist(), right.tolist(), bits.tolist(), strict=True))
    differing = [(i, j, (values[i] ^ values[j]).bit_count()) for j in range(len(values)) for i in range(j)]
    assert sorted(found) == sorted(pair for pair in differing if pair[2] <= distance)


def test_close_pairs_whose_differing_bits_are_spread_evenly() -> None:
    for distance in range(1, 17):
        spread = sum(1 << (64 * k // distance) for k in range(distance))
        hashes = np.array([0x0123_4567_89AB_CDEF, 0x0123_4567_89AB_CDEF ^ spread], dtype=np.uint64)
        assert [bits.tolist() for _, _, bits in close_pairs(hashes, distance)] == [[distance]]
        assert list(close_pairs(hashes, distance - 1)) == []


def test_many_hashes_are_not_compared_each_with_each() -> None:
    hashes = np.random.RandomState(0).randint(0, 2**63, size=50_000, dtype=np.int64).astype(np.uint64)
    hashes[-1] = hashes[0] ^ np.uint64(0b1011)
    assert [(left.tolist(), right.tolist()) for left, right, _ in close_pairs(hashes, 4)] == [([0], [49_999])]


def test_plain_pictures_have_no_perceptual_hash() -> None:
    perceptual_hash = perceptual_hasher()
    ramp = Image.linear_gradient("L").convert("RGB")
    half = Image.new("RGB", (64, 64), "black")
    half.paste("white", (0, 0, 32, 64))
    assert [perceptual_hash(image) for image in (ramp, half)] == [None, None]
    assert perceptual_hash(drawing(3)) is not None


def test_flat_pictures_are_no_near_duplicates(pictures: Path) -> None:
    for k, name in enumerate(("apple", "bolt", "cog")):
        Image.new("RGB", (64, 64), (k, k, k)).save(pictures / name / "black.png")
        faint = np.random.RandomState(0).randint(120, 125, (64, 64), dtype=np.uint8)  # would have a hash
        faint[0, 0] = k
        Image.fromarray(faint).save(pictures / name / "grey.png")
    assert codes(check_dataset(pictures)) == {"flat"}


def test_the_distance_decides_and_0_switches_off(pictures: Path) -> None:
    almost = Image.open(pictures / "apple/0.png").convert("RGB")
    almost.save(pictures / "bolt/almost.jpg", quality=80)
    off = check_dataset(pictures, near=0)
    assert codes(off) == {"not-run"}
    assert off.near is None
    assert "switched off" in off.findings[0].message
    on = check_dataset(pictures, near=4)
    assert on.near is not None
    assert on.near.pairs == {"near-leakage": 0, "near-conflict": 1, "near-duplicate": 0}
    assert on.near.compared == 17


def test_equal_pictures_are_not_near_duplicates_as_well(pictures: Path) -> None:
    shutil.copy(pictures / "apple/0.png", pictures / "bolt/copy.png")
    report = check_dataset(pictures)
    assert report.near is not None
    assert sum(report.near.pairs.values()) == 0


def test_without_imagehash_the_report_says_what_was_not_done(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    shutil.copy(pictures / "apple/0.png", pictures / "bolt/copy.png")
    report = check_dataset(pictures)
    assert codes(report) == {"label-conflict", "not-run"}
    assert "pip install 'siamese-toolkit[check]'" in report.findings[-1].message
    assert report.near is None


# --- the cheap part ------------------------------------------------------------------------------------------------


def test_the_cheap_part_says_nothing_of_a_clean_folder(pictures: Path) -> None:
    assert quick_findings(scan_image_folder(pictures)) == []
    assert quick_line(scan_image_folder(pictures)) is None


def test_the_cheap_part_on_one_line(pictures: Path) -> None:
    shutil.copy(pictures / "apple/0.png", pictures / "bolt/co\npy.png")
    (pictures / "Apple").mkdir()
    shutil.copy(pictures / "cog/0.png", pictures / "Apple/other.jpg")
    (pictures / "void").mkdir()
    shutil.copy(pictures / "door/0.png", pictures / "door/copy.png")  # no conflict: left to the full check
    folder = scan_image_folder(pictures)
    assert [finding.code for finding in quick_findings(folder)] == [
        "label-conflict",
        "label-conflict",
        "class-twins",
        "empty-class",
        "one-picture",
    ]
    line = quick_line(folder)
    assert line is not None
    assert "pictures in more than one class (2)" in line
    assert "one picture (1)" in line
    assert line.isprintable()
    assert f"siamese check {pictures}" in line


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_the_cheap_part_compares_large_files_in_full(pictures: Path, size: int) -> None:
    random = np.random.RandomState(1)
    data = random.bytes(size)
    (pictures / "apple/a.bmp").write_bytes(data)
    (pictures / "bolt/b.bmp").write_bytes(data)
    (pictures / "cog/c.bmp").write_bytes(b"x" + data[1:])  # differs in its first byte only
    (pictures / "door/d.bmp").write_bytes(random.bytes(size))
    (finding,) = quick_findings(scan_image_folder(pictures))
    assert (finding.code, finding.paths) == (
        "label-conflict",
        (str(pictures / "apple/a.bmp"), str(pictures / "bolt/b.bmp")),
    )


def test_the_cheap_part_is_bounded(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(pictures / "apple/0.png", pictures / "bolt/copy.png")
    monkeypatch.setattr("siamese_deploy.dataset_check.quick.QUICK_FILES", 1)
    assert [finding.code for finding in quick_findings(scan_image_folder(pictures))] == ["not-run"]
    assert quick_line(scan_image_folder(pictures)) is None
