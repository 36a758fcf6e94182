"""Evaluations of more pairs than one chunk has."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, assert_refused
from PIL import Image

from siamese_deploy import OnnxVerifier
from siamese_deploy.cli.eval import main as siamese_eval
from siamese_deploy.demo_data import draw_character
from siamese_deploy.embedding import SCORE_CHUNK_PAIRS
from siamese_deploy.evaluate import evaluate_pairs, resample
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.metrics import accepted
from siamese_deploy.metrics_file import metrics_content
from siamese_deploy.pair_drawing import PairDrawing, draw_pair
from siamese_deploy.pairs import every_pair, one_shot_pairs, sample_pairs
from siamese_deploy.verifier import Embeddings, Scores


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 classes of 10 pictures: 8,385 pairs."""
    root = tmp_path_factory.mktemp("many")
    for k in range(13):
        (root / f"c{k:02}").mkdir()
        for n in range(10):
            draw_character(k, n).resize((40, 48), Image.Resampling.BILINEAR).save(root / f"c{k:02}/{n}.png")
    return root


def test_scores_and_flips_stay_with_their_pairs_across_chunks(
    run: RunCommand, many: Path, tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", many, "--pairs", "all", "--provider", "cpu")
    for name, bundle, more in (("a", tiny_bundle, ()), ("b", other_bundle, ("--compare", tmp_path / "a"))):
        result = run(siamese_eval, *evaluate, "-o", tmp_path / name, "-c", bundle, *more)
        assert result.exit_code == 0, result.output
        assert "and 0 pair pictures" in result.stdout  # more than are drawn unasked
    rows = {}
    for name in ("a/pairs.csv", "b/pairs.csv", "b/flips.csv"):
        with open(tmp_path / name, newline="") as file:
            rows[name] = list(csv.DictReader(file))
    before, after, flips = rows.values()
    assert len(before) > SCORE_CHUNK_PAIRS
    verifier = OnnxVerifier(other_bundle, provider="cpu")
    for k in (0, SCORE_CHUNK_PAIRS - 1, SCORE_CHUNK_PAIRS, len(after) - 1):
        score = verifier.compare(many / after[k]["left"], many / after[k]["right"])
        assert float(after[k]["score"]) == pytest.approx(score, abs=1e-6)
    flipped = [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a["decision"] != b["decision"]]
    assert flipped[-1] >= SCORE_CHUNK_PAIRS
    assert [int(row["pair"]) for row in flips] == flipped
    for row in flips:
        of_both = [rows[name][int(row["pair"])] for name in ("a/pairs.csv", "b/pairs.csv")]
        assert {(one["left"], one["right"]) for one in of_both} == {(row["left"], row["right"])}
        assert [one["score"] for one in of_both] == [row["score_before"], row["score_after"]]
    changes = json.loads((tmp_path / "b/comparison.json").read_text())["changes"].values()
    certain = [change for change in changes if change["difference"]["p_value"] < 0.05]
    assert certain
    for change in certain:  # after minus before, also in the interval
        middle = (change["difference"]["low"] + change["difference"]["high"]) / 2
        assert middle * (change["after"] - change["before"]) > 0


def test_beyond_the_exact_limit_figures_are_streamed_and_say_how_far_off_they_can_be(
    many: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    folder = scan_image_folder(many)
    exact = evaluate_pairs(verifier, folder, every_pair(folder))
    monkeypatch.setattr("siamese_deploy.evaluate.EXACT_PAIRS", 1000)
    monkeypatch.setattr("siamese_deploy.evaluate.SCORES_IN_MEMORY", 1000)
    streamed = evaluate_pairs(verifier, folder, every_pair(folder))
    assert isinstance(streamed.scores, np.memmap)
    assert np.array_equal(streamed.scores, exact.scores)
    contents = [
        metrics_content(found, resample(found), verifier, pair_scheme="all", seed=None) for found in (exact, streamed)
    ]
    assert [content["exact"] for content in contents] == [True, False]
    assert contents[0]["bounds"] == {}
    for name in ("roc_auc", "average_precision", "eer", "loss", "accuracy"):
        assert abs(contents[0][name] - contents[1][name]) <= contents[1]["bounds"][name] + 1e-9
    for name in ("pairs", "same_pairs", "pair_digest"):
        assert contents[0][name] == contents[1][name]


class Uncertain:
    """Scores of the first calls are off, as those of another batch size may be, much less, on a GPU."""

    def __init__(self, verifier: OnnxVerifier, calls: int) -> None:
        self._verifier, self._calls = verifier, calls

    def __getattr__(self, name: str) -> object:
        return getattr(self._verifier, name)

    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        self._calls -= 1
        scores = self._verifier.score(left, right)
        return scores + np.float32(0.03) if self._calls >= 0 else scores


def test_a_streamed_evaluation_compares_with_itself_as_equal(
    run: RunCommand, many: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siamese_deploy.evaluate.EXACT_PAIRS", 1000)
    evaluate = ("-v", many, "--pairs", "all", "-c", tiny_bundle, "--provider", "cpu", "-o")
    assert run(siamese_eval, *evaluate, tmp_path / "a").exit_code == 0
    result = run(siamese_eval, *evaluate, tmp_path / "b", "--compare", tmp_path / "a", "--max_drop", "0")
    assert result.exit_code == 0, result.output
    for change in json.loads((tmp_path / "b/comparison.json").read_text())["changes"].values():
        assert change["difference"] == {"low": 0, "high": 0, "p_value": 1}


def test_a_full_disk_is_an_error_and_no_signal(
    run: RunCommand, many: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _start: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("siamese_deploy.evaluate.SCORES_IN_MEMORY", 1000)
    monkeypatch.setattr(os, "posix_fallocate", full)
    evaluate = ("-v", many, "--pairs", "all", "-c", tiny_bundle, "--provider", "cpu", "-o", tmp_path / "a")
    assert_refused(run(siamese_eval, *evaluate), 5, "No space left")


def test_what_could_not_be_scored_is_counted_and_listed(
    run: RunCommand, many: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(many, root)
    (root / "c03/3.png").write_bytes(b"")
    for picture in (root / "c05").iterdir():
        picture.write_bytes(b"")
    for options in (("--pairs", "all"), ("--protocol", "one-shot", "--ways", "5", "--episodes", "30")):
        out = tmp_path / options[1]
        result = run(siamese_eval, "-v", root, "-o", out, "-c", tiny_bundle, "--images", "none", *options)
        assert result.exit_code == 0, result.output
        metrics = json.loads((out / "metrics.json").read_text())
        with open(out / "skipped_pairs.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == metrics["pairs_skipped"] > 0
        lost = {"c03/3.png"} | {f"c05/{n}.png" for n in range(10)}
        touched = [row for row in rows if {row["left"], row["right"]} & lost]
        if options[1] == "all":  # 130 pictures, of which 119 are readable
            assert touched == rows
            assert len(rows) == 130 * 129 // 2 - 119 * 118 // 2
            assert (metrics["images"], metrics["classes"], metrics["intervals"]["classes"]) == (119, 12, 12)
        else:
            assert len(rows) % 5 == 0
            assert all(any(row in touched for row in rows[k : k + 5]) for k in range(0, len(rows), 5))


@pytest.mark.parametrize(
    ("images", "case"),
    [
        *(("all", case) for case in ("plain", "unreadable", "one-shot", "uncertain")),
        *(("errors", case) for case in ("unreadable", "uncertain")),
        (7, "unreadable"),
        (None, "plain"),
        ("none", "plain"),
    ],
)
def test_pictures_drawn_while_embedding_are_those_drawn_afterwards(
    many: Path, tiny_bundle: Path, tmp_path: Path, images: str | int | None, case: str
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(many, root)
    if case in ("unreadable", "one-shot"):
        (root / "c01/3.png").write_bytes(b"")
        (root / "c12/9.png").write_bytes(b"")
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    folder = scan_image_folder(root)
    pairs = one_shot_pairs(folder, 5, 20) if case == "one-shot" else sample_pairs(folder)
    drawn: list[dict[str, bytes]] = []
    for early in (True, False):
        staging = tmp_path / f"early{early}"
        staging.mkdir()
        asked = Uncertain(verifier, 3 if early else 0) if case == "uncertain" else verifier
        with PairDrawing(staging, folder, pairs, asked, images) as drawing:
            found = evaluate_pairs(asked, folder, pairs, after_batch=drawing.draw_early if early else None)
            if early and images in ("all", None):
                deadline = time.monotonic() + 30
                while not list(staging.glob("*.png")):  # without being asked to finish
                    assert time.monotonic() < deadline
            number = drawing.finish(found)
        drawn.append({file.name: file.read_bytes() for file in staging.iterdir()})
        assert len(drawn[-1]) == number
    assert drawn[0] == drawn[1]
    for name in drawn[0]:
        picture = np.asarray(Image.open(staging / name))
        assert np.array_equal(picture, np.asarray(draw_pair(found, int(name.removesuffix(".png")))))
    wrong = accepted(found.scores, found.metrics.threshold) != found.pairs.is_same
    expected = {"all": range(len(found.pairs)), "errors": np.flatnonzero(wrong), "none": (), 7: range(7)}
    assert set(drawn[0]) == {f"{k}.png" for k in expected[images or "all"]}
