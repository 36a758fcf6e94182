"""Options that are no numbers, paths that are no places for results, and names that look like options."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import RunCommand, assert_refused

from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.eval import main as siamese_eval
from siamese_deploy.durable_files import locked_folder
from siamese_deploy.errors import UsageError

FULLWIDTH_12 = "\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**64)), "--seed"),
        (("--seed", "1.5"), "--seed"),
        (("--num_pairs", "0"), "--num_pairs"),
        (("--images", "-1"), "--images"),
        (("--images", FULLWIDTH_12), "--images"),
        (("--min_auc", "nan"), "--min_auc"),
        (("--max_eer", "1e999"), "--max_eer"),
        (("--threads", "-1"), "--threads"),
        (("--provider", ""), "--provider"),
    ],
)
def test_options_out_of_range_end_before_anything_is_touched(
    run: RunCommand, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    """Neither the pictures nor the bundle is there: what is said of the option is said first."""
    out = tmp_path / "out"
    result = run(siamese_eval, "-v", tmp_path / "no", "-o", out, "-c", tmp_path / "none", *options)
    assert_refused(result, 2, words)
    assert not out.exists()


@pytest.mark.parametrize("value", ["nan", "-0.1", "2", "1e999", "", "0,5"])
def test_thresholds_and_margins_that_are_none(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, value: str
) -> None:
    picture, gallery = pictures / "apple/0.png", tmp_path / "gallery"
    enrolled = run(siamese, "gallery", "enrol", gallery, picture, "--name", "apple", "-c", tiny_bundle)
    assert enrolled.exit_code == 0, enrolled.output
    for command in (("verify", picture, picture), ("gallery", "identify", gallery, picture)):
        assert_refused(run(siamese, *command, "-c", tiny_bundle, "--threshold", value), 2, "threshold")
    identify = ("gallery", "identify", gallery, picture, "-c", tiny_bundle, "--margin", value)
    assert_refused(run(siamese, *identify), 2, "margin")


def test_a_digit_of_another_script_is_the_digit(run: RunCommand, tmp_path: Path) -> None:
    options = ("--train_classes", FULLWIDTH_12, "--val_classes", "2", "--drawings", "2")
    result = run(siamese, "demo_data", tmp_path / "d", *options)
    assert result.exit_code == 0, result.output
    assert "12 characters" in result.stdout
    assert len(os.listdir(tmp_path / "d/train")) == 12


def test_the_root_and_the_home_are_no_places_for_results(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "to-home").symlink_to(home)
    (tmp_path / "to-root").symlink_to("/")
    # The home first: where the guard is broken, the test ends before it writes into the root.
    for out in (home, f"{home}/.", tmp_path / "to-home", "/", "/../.", tmp_path / "to-root"):
        result = run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle)
        assert_refused(result, 2, "where no results belong")
        with pytest.raises(UsageError, match="choose a folder in it"), locked_folder(Path(out)):
            pass
    assert os.listdir(home) == []
    assert run(siamese_eval, "-v", pictures, "-o", home / "results", "-c", tiny_bundle).exit_code == 0


def test_results_go_through_a_link_and_nothing_is_deleted_through_it(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        result = run(siamese_eval, "-v", pictures, "-o", tmp_path / "link", "-c", tiny_bundle)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/notes.txt").read_text() == "mine"
    assert (tmp_path / "real/metrics.json").exists()
    # a link in place of a result is replaced, and what it leads to stays
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "real/0.png").unlink()
    (tmp_path / "real/0.png").symlink_to(tmp_path / "precious")
    assert run(siamese_eval, "-v", pictures, "-o", tmp_path / "link", "-c", tiny_bundle).exit_code == 0
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "real/0.png").is_symlink()


def test_places_where_no_folder_can_be_made(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, exit_code in ((tmp_path / "file", 2), (tmp_path / "file/out", 2), ("/proc/nowhere", 5)):
        assert_refused(run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle), exit_code, str(out))


def test_names_that_look_like_options(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "apple/0.png", "--help")
    shutil.copy(pictures / "apple/0.png", "-o-ne.png")
    shutil.copytree(pictures, "-pictures")
    verify = ("verify", "-c", tiny_bundle, "--threshold", 0)
    found = run(siamese, *verify, "--", "--help", "-o-ne.png")
    assert (found.exit_code, found.stdout.startswith("match")) == (0, True), found.output
    assert_refused(run(siamese, *verify, "-o-ne.png", "--", "--help"), 2, "-o")
    result = run(siamese_eval, "-v", "-pictures", "-o", "-out", "-c", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert Path("-out/metrics.json").exists()
    assert_refused(run(siamese, "gallery", "enrol", "g", "*.jpg", "--name", "x", "-c", tiny_bundle), 3, "*.jpg")


def test_very_many_arguments(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """As many as a shell's * may give; one picture, so that they cost little."""
    sources = [pictures / "apple/0.png"] * 20_000
    result = run(siamese, "verify", *sources, "-c", tiny_bundle)
    assert_refused(result, 2, "unexpected extra argument")
