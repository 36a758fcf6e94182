from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCommand, assert_refused
from PIL import Image
from planted_faults import clean_folder, drawing, encoded

from siamese_deploy.cli import main as siamese
from siamese_deploy.dataset_check import check as dataset_check

KEYS = {"format", "exit_code", "strict", "folders", "counts", "codes", "near_duplicates", "findings"}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return clean_folder(tmp_path / "clean")


@pytest.fixture
def conflict(clean: Path) -> Path:
    shutil.copy(clean / "apple/0.png", clean / "bolt/copy.png")
    return clean


def contact_sheet(tmp_path: Path) -> Image.Image:
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        return sheet.convert("RGB")


def as_json(run: RunCommand, *arguments: object) -> dict[str, Any]:
    result = run(siamese, "check", *arguments, "--json")
    assert result.stderr == ""
    assert result.stdout.isascii()
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["exit_code"] == result.exit_code
    assert set(report) == KEYS
    assert sum(report["counts"].values()) == sum(report["codes"].values()) == len(report["findings"])
    return report


def test_a_clean_folder(run: RunCommand, clean: Path) -> None:
    result = run(siamese, "check", clean)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{clean}: 16 of 16 pictures usable, 4 classes of 4 to 4",
        "verdict: nothing found",
    ]
    assert as_json(run, clean, "--strict")["findings"] == []


def test_the_default_distance_is_the_librarys(run: RunCommand, clean: Path) -> None:
    assert as_json(run, clean)["near_duplicates"] == {
        "run": True,
        "distance": dataset_check.NEAR_DISTANCE,
        "compared": 16,
        "pairs": {"near-leakage": 0, "near-conflict": 0, "near-duplicate": 0},
    }
    assert as_json(run, clean, "--near", "0")["near_duplicates"]["pairs"] is None


def test_exit_codes(run: RunCommand, clean: Path) -> None:
    assert as_json(run, clean, "--strict")["exit_code"] == 0
    (clean / ".hidden").touch()
    assert as_json(run, clean, "--strict")["exit_code"] == 0  # a note
    shutil.copy(clean / "apple/0.png", clean / "apple/copy.png")
    assert as_json(run, clean)["exit_code"] == 0  # a warning
    assert as_json(run, clean, "--strict")["exit_code"] == 11
    (clean / "apple/zero.png").touch()
    assert as_json(run, clean)["exit_code"] == 11  # an error
    result = run(siamese, "check", clean)
    assert result.exit_code == 11
    assert result.stdout.splitlines()[-1] == "verdict: 1 error, 1 warning, 1 note; to be repaired"


def test_refusals(run: RunCommand, clean: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(run(siamese, "check", tmp_path / "missing"), 3, "missing", "no such folder")
    assert_refused(run(siamese, "check", clean, "--against", tmp_path / "empty"), 3, "empty", "no pictures")
    assert_refused(run(siamese, "check", clean, "--near", "17"), 2, "--near")
    assert_refused(run(siamese, "check"), 2, "DIR")
    assert_refused(run(siamese, "check", clean, "-o", clean / "apple"), 2, "lies in the picture folder")
    (tmp_path / "file").touch()
    assert_refused(run(siamese, "check", clean, "-o", tmp_path / "file"), 2, "is a file")


def test_examples_are_few_and_counts_complete(run: RunCommand, clean: Path) -> None:
    for k in range(7):
        (clean / f"apple/zero{k}.png").touch()
    result = run(siamese, "check", clean)
    assert "error    unreadable (7): " in result.stdout
    assert result.stdout.count("empty file") == 3
    assert "... and 4 more" in result.stdout
    assert as_json(run, clean)["codes"] == {"unreadable": 7}


def test_hostile_names_on_the_terminal_in_json_and_in_csv(run: RunCommand, tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)  # a spreadsheet looks at the first character of a path
    try:
        root = clean_folder(Path("=cmd|calc"))
        names = ["new\nline,\x1b[31m.png", os.fsdecode(b"caf\xe9.png")]
        for k, name in enumerate(names):
            (root / "apple" / name).write_bytes(encoded(drawing(9 + k), "PNG"))
        result = run(siamese, "check", root, "-o", "out")
        report = as_json(run, root)
        rows = list(csv.reader(io.StringIO(Path("out/findings.csv").read_bytes().decode("utf-8", "surrogateescape"))))
        assert json.loads(Path("out/findings.json").read_text("ascii")) == report
    finally:
        os.chdir(before)
    assert result.exit_code == 0
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert r"new\nline,\x1b[31m.png" in result.stdout
    shown = sorted(f"{root}/apple/{name}" for name in names)
    assert sorted(finding["paths"][0] for finding in report["findings"]) == shown
    assert rows[0] == ["finding", "severity", "code", "path", "message"]
    assert sorted(row[3] for row in rows[1:]) == [f"./{path}" for path in shown]
    assert {tuple(row[1:3]) for row in rows[1:]} == {("note", "odd-name")}


def test_the_files_of_a_check(run: RunCommand, conflict: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(siamese, "check", conflict, "-o", out)
    assert result.exit_code == 11
    assert result.stdout.splitlines()[-1] == f"written: {out}/findings.csv, findings.json and contact_sheet.png"
    assert json.loads((out / "findings.json").read_text("ascii")) == as_json(run, conflict)
    rows = list(csv.DictReader(io.StringIO((out / "findings.csv").read_text("utf-8"))))
    assert [(row["finding"], row["code"], row["path"]) for row in rows] == [
        ("1", "label-conflict", f"{conflict}/apple/0.png"),
        ("1", "label-conflict", f"{conflict}/bolt/copy.png"),
    ]
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run(siamese, "check", conflict, "-o", out)  # its own files are replaced
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_files_of_somebody_else_are_not_replaced(run: RunCommand, conflict: Path, tmp_path: Path) -> None:
    (tmp_path / "findings.csv").write_text("mine")
    assert_refused(run(siamese, "check", conflict, "-o", tmp_path), 2, "findings.csv", "choose another folder")
    assert (tmp_path / "findings.csv").read_text() == "mine"
    assert not (tmp_path / "findings.json").exists()


def test_the_contact_sheet_shows_what_is_equal_side_by_side(run: RunCommand, conflict: Path, tmp_path: Path) -> None:
    run(siamese, "check", conflict, "-o", tmp_path / "out")
    sheet = contact_sheet(tmp_path)
    left, right = (sheet.crop((x, 68, x + 120, 188)) for x in (16, 144))
    assert left.tobytes() == right.tobytes()
    assert len(set(left.convert("L").tobytes())) > 20  # a drawing, not an empty tile
    assert sheet.crop((300, 40, sheet.width, sheet.height)).getextrema() == ((255, 255),) * 3  # and nothing else


def test_the_contact_sheet_shows_both_of_a_pair(run: RunCommand, clean: Path, tmp_path: Path) -> None:
    almost = Image.open(clean / "apple/0.png").convert("RGB")
    almost.paste("red", (0, 0, 4, 4))
    almost.save(clean / "bolt/almost.png")
    report = as_json(run, clean, "-o", tmp_path / "out")
    assert report["codes"] == {"near-conflict": 1}
    sheet = contact_sheet(tmp_path)
    left, right = (sheet.crop((x, 68, x + 120, 188)) for x in (16, 144))
    assert left.tobytes() != right.tobytes()
    assert left.crop((30, 30, 120, 120)).tobytes() == right.crop((30, 30, 120, 120)).tobytes()


def test_the_contact_sheet_is_bounded(run: RunCommand, clean: Path, tmp_path: Path) -> None:
    for k in range(30):
        (clean / f"apple/zero{k}.png").touch()
        shutil.copy(clean / "apple/0.png", clean / f"bolt/copy{k}.png")
    run(siamese, "check", clean, "-o", tmp_path / "out")
    sheet = contact_sheet(tmp_path)
    assert sheet.width == 1048
    assert sheet.height < 500


def test_the_contact_sheet_of_a_clean_folder_shows_its_classes(run: RunCommand, clean: Path, tmp_path: Path) -> None:
    run(siamese, "check", clean, "-o", tmp_path / "out")
    sheet = contact_sheet(tmp_path)
    tiles = [sheet.crop((16 + 128 * k, 50, 136 + 128 * k, 170)) for k in range(5)]
    assert [len(set(tile.convert("L").tobytes())) > 20 for tile in tiles] == [True] * 4 + [False]
    assert len({tile.tobytes() for tile in tiles}) == 5


def test_an_interrupt_ends_it_and_leaves_no_result(
    run: RunCommand, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = dataset_check.audit_picture

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT) if arguments[0].endswith("cog/1.png") else None
        return audit(*arguments)

    monkeypatch.setattr(dataset_check, "audit_picture", interrupted)
    result = run(siamese, "check", clean, "-o", tmp_path / "out")
    assert_refused(result, 130, "interrupted")
    assert os.listdir(tmp_path / "out") == []


def test_two_runs_give_the_same_text(run: RunCommand, conflict: Path) -> None:
    texts = {run(siamese, "check", conflict, "--against", conflict / "..", "--json").stdout for _ in range(2)}
    assert len(texts) == 1
