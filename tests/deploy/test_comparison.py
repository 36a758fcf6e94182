from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from conftest import RunCommand, assert_refused

from siamese_deploy.cli.eval import main as siamese_eval


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def test_an_earlier_evaluation_of_the_same_pairs(
    run: RunCommand, pictures: Path, tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", pictures, "--pairs", "all", "--images", "none")
    assert run(siamese_eval, *evaluate, "-o", tmp_path / "a", "-c", tiny_bundle).exit_code == 0
    result = run(
        siamese_eval, *evaluate, "-o", tmp_path / "b", "-c", other_bundle, "--compare", tmp_path / "a/metrics.json"
    )
    assert result.exit_code == 0, result.output
    before, after = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    found = json.loads((tmp_path / "b/comparison.json").read_text())
    assert found["before"] == before["model_digest"]
    change = found["changes"]["roc_auc"]
    assert (change["before"], change["after"]) == (before["roc_auc"], after["roc_auc"])
    difference = change["difference"]
    assert difference["low"] <= change["after"] - change["before"] <= difference["high"]
    assert 0 < difference["p_value"] <= 1

    rows = [table(tmp_path / name / "pairs.csv") for name in "ab"]
    flipped = [k for k, (a, b) in enumerate(zip(*rows, strict=True)) if a["decision"] != b["decision"]]
    now_right = sum(rows[1][k]["decision"] == rows[1][k]["is_same"] for k in flipped)
    assert 0 < now_right < len(flipped)
    assert (found["flipped"], found["flipped_now_right"]) == (len(flipped), now_right)
    flips = table(tmp_path / "b/flips.csv")
    assert [int(row["pair"]) for row in flips] == flipped
    for row in flips:
        old, new = (side[int(row["pair"])] for side in rows)
        assert (row["left"], row["right"], row["score_before"], row["score_after"]) == (
            old["left"], old["right"], old["score"], new["score"],
        )  # fmt: skip
    assert f"decisions flipped: {len(flipped)} of 120 ({now_right} now right" in result.stdout

    # the folder of the evaluation, and the bundle itself, give the same answer
    for other in (tmp_path / "a", tiny_bundle):
        again = run(siamese_eval, *evaluate, "-o", tmp_path / "c", "-c", other_bundle, "--compare", other)
        assert again.exit_code == 0, again.output
        for name in ("comparison.json", "flips.csv"):
            assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_against_itself(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--compare", tiny_bundle, "--max_drop", "0")
    result = run(siamese_eval, *evaluate)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert found["flipped"] == 0
    for change in found["changes"].values():
        assert change["difference"] == {"low": 0, "high": 0, "p_value": 1}


def test_other_pairs_are_refused(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    evaluate = ("-v", pictures, "-c", tiny_bundle)
    assert run(siamese_eval, *evaluate, "-o", tmp_path / "a").exit_code == 0
    other = run(siamese_eval, *evaluate, "-o", tmp_path / "b", "--seed", "2", "--compare", tmp_path / "a")
    assert_refused(other, 3, "is an evaluation of other pairs", "same --pairs and --seed")
    assert not (tmp_path / "b/metrics.json").exists()


@pytest.mark.parametrize(
    ("damage", "exit_code", "words"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), 3, "metrics.json: No such file"),
        (lambda folder: (folder / "metrics.json").write_text("[" * 200_000), 4, "not JSON"),
        (lambda folder: as_folder(folder / "metrics.json"), 3, "not a regular file"),
        (lambda folder: as_folder(folder / "pairs.csv"), 3, "not a regular file"),
        (lambda folder: as_pipe(folder / "pairs.csv"), 3, "not a regular file"),
        (lambda folder: with_threshold(folder / "metrics.json", True), 4, "has no threshold"),
        (lambda folder: with_threshold(folder / "metrics.json", 1.5), 4, "has no threshold"),
        (lambda folder: (folder / "metrics.json").write_text("{"), 4, "not JSON"),
        (lambda folder: (folder / "metrics.json").write_text('{"format": "other/1"}'), 4, "siamese-evaluation/1"),
        (lambda folder: (folder / "pairs.csv").unlink(), 3, "pairs.csv: No such file"),
        (lambda folder: edit(folder, lambda rows: rows[:-1]), 4, "does not hold the pairs"),
        (lambda folder: edit(folder, lambda rows: [*rows, rows[-1]]), 4, "does not hold the pairs"),
        (
            lambda folder: edit(folder, lambda rows: [rows[0], rows[2], rows[1], *rows[3:]]),
            4,
            "does not hold the pairs",
        ),
        (lambda folder: edit(folder, lambda rows: [rows[0].replace("score", "x"), *rows[1:]]), 4, "does not hold"),
        (
            lambda folder: edit(folder, lambda rows: [*rows[:-1], with_score(rows[-1], "nan")]),
            4,
            "pairs.csv: has scores",
        ),
        (lambda folder: edit(folder, lambda rows: [*rows[:-1], with_score(rows[-1], "2")]), 4, "pairs.csv: has scores"),
    ],
)
def test_a_damaged_earlier_evaluation(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, damage, exit_code: int, words: str
) -> None:
    evaluate = ("-v", pictures, "-c", tiny_bundle, "--images", "none")
    assert run(siamese_eval, *evaluate, "-o", tmp_path / "a").exit_code == 0
    damage(tmp_path / "a")
    assert_refused(run(siamese_eval, *evaluate, "-o", tmp_path / "b", "--compare", tmp_path / "a"), exit_code, words)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def with_threshold(file: Path, threshold: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threshold": threshold}))


def test_a_wrong_path_is_told_of_before_anything_is_computed(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "b", "-c", tiny_bundle, "--compare")
    for wrong, exit_code in ((tmp_path / "none", 3), (pictures / "apple/0.png", 4), (pictures / "apple/0.png/x", 3)):
        result = run(siamese_eval, *evaluate, wrong)
        assert_refused(result, exit_code, str(wrong))
        assert result.stdout == ""
    assert_refused(run(siamese_eval, *evaluate, ""), 2, "is empty")


def edit(folder: Path, change) -> None:
    file = folder / "pairs.csv"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")


def with_score(row: str, score: str) -> str:
    left, right, is_same, _, decision = row.split(",")
    return ",".join((left, right, is_same, score, decision))


def test_gates(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--images", "none")
    assert run(siamese_eval, *evaluate).exit_code == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    auc, eer = metrics["roc_auc"], metrics["eer"]
    assert 0 < auc < 1
    assert run(siamese_eval, *evaluate, "--min_auc", auc, "--max_eer", eer).exit_code == 0
    (tmp_path / "out/metrics.json").unlink()
    missed = run(siamese_eval, *evaluate, "--min_auc", auc + 1e-6)
    assert_refused_after_results(missed, f"ROC AUC is {auc:.6f}, expected at least", "--min_auc", str(tmp_path / "out"))
    assert (tmp_path / "out/metrics.json").exists()
    assert_refused_after_results(run(siamese_eval, *evaluate, "--max-eer", eer - 1e-6), "equal error rate is")
    assert_refused(run(siamese_eval, *evaluate, "--max_drop", "0.1"), 2, "expected --compare")
    assert_refused(run(siamese_eval, *evaluate, "--min_auc", "nan"), 2, "min_auc")


def test_a_drop_trips_the_gate(
    run: RunCommand, pictures: Path, tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", pictures, "--pairs", "all", "--images", "none", "-o", tmp_path / "out", "-c")
    aucs = []
    for bundle in (tiny_bundle, other_bundle):
        assert run(siamese_eval, *evaluate, bundle).exit_code == 0
        aucs.append(json.loads((tmp_path / "out/metrics.json").read_text())["roc_auc"])
    better, worse = (tiny_bundle, other_bundle) if aucs[0] > aucs[1] else (other_bundle, tiny_bundle)
    drop = abs(aucs[0] - aucs[1])
    assert drop > 0.001
    assert run(siamese_eval, *evaluate, worse, "--compare", better, "--max_drop", drop + 1e-6).exit_code == 0
    assert run(siamese_eval, *evaluate, better, "--compare", worse, "--max_drop", "0").exit_code == 0
    result = run(siamese_eval, *evaluate, worse, "--compare", better, "--max_drop", drop - 1e-6)
    assert_refused_after_results(result, "drop in ROC AUC")


def test_a_figure_that_is_undefined_passes_no_gate(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "same.csv").write_text("left,right,label\napple/0.png,apple/1.png,1\nbolt/0.png,bolt/1.png,1\n")
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--pairs", tmp_path / "same.csv")
    result = run(siamese_eval, *evaluate, "--min_auc", "0", "--max_eer", "1")
    assert_refused_after_results(result, "ROC AUC is undefined", "equal error rate is undefined")
    drop = run(siamese_eval, *evaluate, "--compare", tiny_bundle, "--max_drop", "1")
    assert_refused_after_results(drop, "drop in ROC AUC is undefined")


def assert_refused_after_results(result, *words: str) -> None:
    assert result.exit_code == 11, result.output
    last = result.stderr.splitlines()[-1]
    for word in words:
        assert word in last
