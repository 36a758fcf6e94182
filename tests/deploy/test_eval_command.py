from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import RunCommand, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_bundle import make_bundle

from siamese_deploy import OnnxVerifier, evaluate_folder
from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.eval import main as siamese_eval
from siamese_deploy.pairs_csv import shortest_float32
from siamese_deploy.result_folder import result_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def results(folder: Path) -> dict[str, object]:
    """What must be the same when an evaluation is repeated: all but the times and versions."""
    found: dict[str, object] = {**contents(folder)}
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["run"], found["report.html"]
    return found | {"metrics.json": json.dumps(metrics)}  # their order too


def test_writes_metrics_pairs_and_a_picture_for_each(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    result = run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle, "--provider", "cpu")
    assert result.exit_code == 0, result.output
    assert "provider: cpu (onnxruntime)\n" in result.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pair_digest"] in result.stdout
    assert (metrics["pairs"], metrics["backend"], metrics["provider"]) == (16, "onnxruntime", "cpu")

    with open(out / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["left", "right", "is_same", "score", "decision"]
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    evaluation = evaluate_folder(verifier, pictures)
    for k, row in enumerate(rows):
        assert row["left"] == evaluation.folder.paths[evaluation.pairs.left[k]]
        assert row["is_same"] == str(int(row["left"].split("/")[0] == row["right"].split("/")[0]))
        assert np.float32(row["score"]) == evaluation.scores[k]
        assert float(row["score"]) == pytest.approx(verifier.compare(pictures / row["left"], pictures / row["right"]))
    right = [(float(row["score"]) >= 0.5) == (row["is_same"] == "1") for row in rows]
    assert [row["decision"] == row["is_same"] for row in rows] == right
    assert metrics["accuracy"] == pytest.approx(np.mean(right))

    assert sorted(file.name for file in out.glob("*.png")) == sorted(f"{k}.png" for k in range(16))
    for k, row in enumerate(rows):
        picture = np.asarray(Image.open(out / f"{k}.png"))
        framed_right = picture[0, 0].tolist() == [0, 114, 178]
        assert framed_right == right[k]
        # the left picture's own pixels are in the left half, in colour
        paper = np.asarray(Image.open(pictures / row["left"]))[1, 1].astype(int)
        assert np.abs(picture[40:60, 30:50].astype(int) - paper).max(axis=2).min() < 30


def test_twice_gives_the_same_bytes_and_seeds_differ(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("-v", pictures, "-o", tmp_path / name, "-c", tiny_bundle, "--provider", "cpu", "--seed", seed)
        assert run(siamese, "eval", *arguments).exit_code == 0
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert contents(tmp_path / "a")["pairs.csv"] != contents(tmp_path / "c")["pairs.csv"]


def test_the_same_everywhere_and_with_every_hash_seed(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    found = []
    cache = ["--cache", str(tmp_path / "cache")]
    # Also on one thread, on three, and with embeddings that the first process has kept.
    how = {"0": [*cache, "--threads", "1"], "1": ["--no_cache", "--threads", "3"], "4294967295": cache}
    for hash_seed, options in how.items():
        elsewhere = tmp_path / f"elsewhere{hash_seed}"
        shutil.copytree(pictures, elsewhere / "pictures")
        command = [Path(sys.executable).with_name("siamese-eval"), "-v", "pictures", "-o", "out", "-c", tiny_bundle]
        command += ["--pairs", "all", "--images", "errors", "--provider", "cpu", *options]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        output = subprocess.run(
            [str(part) for part in command], cwd=elsewhere, check=True, env=environment, stdout=subprocess.PIPE
        ).stdout
        assert (b"from the cache: 16 of 16" in output) == (hash_seed == "4294967295")
        found.append(results(elsewhere / "out"))
    assert found[0] == found[1] == found[2]
    assert any(name.endswith(".png") for name in found[0])


SCHEMA = json.loads((Path(__file__).parents[2] / "docs/metrics.schema.json").read_text())


@pytest.mark.parametrize(
    ("options", "scheme", "pairs"),
    [
        ((), "reference", 16),
        (("--pairs", "all"), "all", 120),
        (("--num_pairs", "10"), "balanced", 10),
        (("--protocol", "one-shot", "--ways", "3", "--episodes", "5"), "one-shot", 15),
        (("--pairs", "list.csv"), "file", 3),
        (("--pairs", "pairs.txt"), "file", 8),
        (("--pairs", "dev.txt"), "file", 4),
    ],
)
def test_every_scheme_gives_a_metrics_file_of_the_schema(
    run: RunCommand,
    pictures: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    scheme: str,
    pairs: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["left,right,label", "apple/0.png,apple/1.png,1", "bolt/0.png,cog/0.png,0", "cog/1.png,cog/2.png,1"]
    Path("list.csv").write_text("\n".join(rows) + "\n")
    for name in ("apple", "bolt", "cog", "door"):  # LFW's names
        for k in range(4):
            shutil.copy(pictures / name / f"{k}.png", pictures / name / f"{name}_{k:04}.png")
    rows = ["2\t2", "apple\t0\t1", "bolt\t0\t1", "apple\t0\tbolt\t0", "cog\t0\tbolt\t1"]
    rows += ["cog\t0\t1", "door\t0\t1", "cog\t2\tdoor\t2", "door\t0\tapple\t1"]
    Path("pairs.txt").write_text("\n".join(rows) + "\n")
    Path("dev.txt").write_text("\n".join(["2", *rows[1:5]]) + "\n")
    for copies in pictures.glob("*/*_*.png"):
        if scheme != "file":
            copies.unlink()
    result = run(siamese_eval, "-v", pictures, "-o", "out", "-c", tiny_bundle, *options)
    assert result.exit_code == 0, result.output
    metrics = json.loads(Path("out/metrics.json").read_text())
    jsonschema.validate(metrics, SCHEMA)
    assert (metrics["pair_scheme"], metrics["pairs"]) == (scheme, pairs)
    assert (metrics["seed"] is None) == (scheme in ("all", "file"))
    assert (metrics["one_shot"] is not None) == (scheme == "one-shot")
    assert (metrics["folds"] is not None) == (options[-1:] == ("pairs.txt",))
    with open("out/pairs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == pairs
    assert "<title>" in Path("out/report.html").read_text()


def test_a_fold_that_cannot_be_read_costs_its_figure_only(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for picture in list(pictures.glob("*/*.png")):
        data = b"" if picture.parent.name == "apple" else picture.read_bytes()
        picture.with_name(f"{picture.parent.name}_000{picture.name}").write_bytes(data)
    rows = ["2 2", "apple 0 1", "apple 2 3", "apple 0 bolt 0", "apple 1 bolt 1"]
    rows += ["bolt 0 1", "cog 0 1", "bolt 2 cog 2", "bolt 3 cog 3"]
    (tmp_path / "pairs.txt").write_text("\n".join(rows) + "\n")
    result = run(
        siamese_eval, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--pairs", tmp_path / "pairs.txt"
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["pairs"], metrics["pairs_skipped"], metrics["folds"]) == (4, 4, None)
    assert "at least two folds" in metrics["not_computed"]["folds"]


def test_options_that_exclude_each_other(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    for options in (
        ("--pairs", "all", "--num_pairs", "4"),
        ("--pairs", "all", "--protocol", "one-shot"),
        ("--num_pairs", "4", "--protocol", "one-shot"),
    ):
        assert_refused(run(siamese_eval, *evaluate, *options), 2, "at most one of them")
    for options in (("--ways", "3"), ("--episodes", "3"), ("--pairs", "all", "--seed", "1")):
        assert_refused(run(siamese_eval, *evaluate, *options), 2, "expected w")
    assert_refused(run(siamese_eval, "-v", pictures, "-o", "", "-c", tiny_bundle), 2, "is empty")


def test_strict_allows_no_picture_to_be_left_out(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--strict")
    assert run(siamese_eval, *evaluate).exit_code == 0
    before = contents(tmp_path / "out")
    (pictures / "bolt/1.png").write_bytes(b"")
    assert_refused(run(siamese_eval, *evaluate), 3, "--strict allows none", "bolt/1.png: empty file")
    assert contents(tmp_path / "out") == before


def test_paths_are_no_formulas_and_come_back(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for old, new in (("apple", "=1+1"), ("bolt", "@x"), ("cog", "-c\r")):
        (pictures / old).rename(pictures / new)
    (pictures / "=1+1/1.png").write_bytes(b"")
    evaluate = ("-v", pictures, "-c", tiny_bundle, "-o")
    assert run(siamese_eval, *evaluate, tmp_path / "a").exit_code == 0
    with open(tmp_path / "a/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row[side][:2] for row in rows for side in ("left", "right")} == {"./", "do"}
    assert (tmp_path / "a/skipped.csv").read_text().splitlines()[1].startswith("./=1+1/1.png,")
    again = run(siamese_eval, *evaluate, tmp_path / "b", "--pairs", tmp_path / "a/pairs.csv")
    assert again.exit_code == 0, again.output
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    assert first["pair_digest"] == second["pair_digest"]


def test_an_odd_folder_is_told_of_on_one_line(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert "data set" not in run(siamese_eval, *evaluate).stderr
    shutil.copy(pictures / "apple/0.png", pictures / "bolt/4.png")
    shutil.copytree(pictures / "cog", pictures / "Cog")
    (line,) = [line for line in run(siamese_eval, *evaluate).stderr.splitlines() if line.startswith("data set: ")]
    assert line.endswith(f"see: siamese check {pictures}")


def test_known_pictures_are_not_embedded_again(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    cache = ("--cache", tmp_path / "cache")
    evaluate = ("-v", pictures, "-c", tiny_bundle, "-o")
    fresh = run(siamese_eval, *evaluate, tmp_path / "fresh", "--no_cache")
    first = run(siamese_eval, *evaluate, tmp_path / "first", *cache)
    second = run(siamese_eval, *evaluate, tmp_path / "second", *cache)
    assert "from the cache" not in fresh.stdout + first.stdout
    assert second.stdout.splitlines()[-1] == "from the cache: 16 of 16 embeddings"
    assert results(tmp_path / "fresh") == results(tmp_path / "first") == results(tmp_path / "second")
    Image.open(pictures / "cog/1.png").rotate(90).save(pictures / "apple/0.png")
    changed = run(siamese_eval, *evaluate, tmp_path / "changed", *cache)
    assert changed.stdout.splitlines()[-1] == "from the cache: 15 of 16 embeddings"
    run(siamese_eval, *evaluate, tmp_path / "fresh", "--no_cache")
    assert results(tmp_path / "changed") == results(tmp_path / "fresh")


def test_a_cache_that_cannot_be_used_costs_no_answer(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    evaluate = ("-v", pictures, "-c", tiny_bundle, "-o", tmp_path / "out")
    result = run(siamese_eval, *evaluate)
    assert result.exit_code == 0
    assert result.stderr.startswith("embeddings are not cached: ")
    assert_refused(run(siamese_eval, *evaluate, "--cache", tmp_path / "open"), 5, "others may write into it")


@pytest.mark.parametrize("images", ["all", "errors", "none", "3", "99"])
def test_which_pairs_are_drawn(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, images: str) -> None:
    out = tmp_path / "out"
    result = run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle, "--images", images)
    with open(out / "pairs.csv", newline="") as file:
        wrong = [
            k for k, row in enumerate(csv.DictReader(file)) if (float(row["score"]) >= 0.5) != (row["is_same"] == "1")
        ]
    assert 0 < len(wrong) < 16
    expected = {"all": range(16), "errors": wrong, "none": [], "3": range(3), "99": range(16)}[images]
    assert {path.name for path in out.glob("*.png")} == {f"{k}.png" for k in expected}
    assert f"and {len(expected)} pair pictures" in result.stdout


def test_images_option_names_its_choices(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--images")
    for wrong in ("some", "-1", "1.5"):
        assert_refused(run(siamese_eval, *arguments, wrong), 2, "expected all, errors, none or a number")


def test_again_replaces_its_own_files_and_nothing_else(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = ("-v", pictures, "-o", out, "-c", tiny_bundle)
    assert run(siamese_eval, *arguments).exit_code == 0
    (pictures / "door/3.png").unlink()
    assert run(siamese_eval, *arguments).exit_code == 0
    assert not (out / "15.png").exists()
    assert len(list(out.glob("*.png"))) == 15
    assert (out / "notes.txt").read_text() == "mine"
    (out / "15.png").write_text("a picture of the user's own")
    before = contents(out)
    assert_refused(run(siamese_eval, *arguments), 2, "15.png", "choose another folder")
    assert contents(out) == before


def test_results_of_other_programs_are_not_overwritten(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "0.png").write_text("the reference scripts wrote this")
    result = run(siamese_eval, "-v", pictures, "-o", tmp_path, "-c", tiny_bundle)
    assert_refused(result, 2, "0.png", "choose another folder")
    (tmp_path / "file").touch()
    assert_refused(run(siamese_eval, "-v", pictures, "-o", tmp_path / "file", "-c", tiny_bundle), 2, "is a file")
    # a record that was tampered with gives no right to delete
    (tmp_path / "0.png").unlink()
    (tmp_path / ".siamese-evaluation").write_text("notes.txt\n../file\n")
    (tmp_path / "notes.txt").touch()
    assert run(siamese_eval, "-v", pictures, "-o", tmp_path, "-c", tiny_bundle).exit_code == 0
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "file").exists()


def test_a_failed_evaluation_leaves_the_earlier_one(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle).exit_code == 0
    before = contents(out)
    assert_refused(run(siamese_eval, "-v", tmp_path / "no", "-o", out, "-c", tiny_bundle), 3, "no such folder")
    assert_refused(run(siamese_eval, "-v", pictures, "-o", out, "-c", tmp_path / "no"), 3, "no such bundle")
    assert contents(out) == before


def test_unreadable_pictures_are_skipped_and_listed(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    good = (pictures / "bolt/1.png").read_bytes()
    (pictures / "bolt/1.png").write_bytes(good[: len(good) // 2])
    (pictures / "cog/2.png").write_text("<html>not found</html>")
    result = run(siamese_eval, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert result.exit_code == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["pairs"] + metrics["pairs_skipped"] == 16
    assert metrics["pairs_skipped"] >= 2
    assert len(list((tmp_path / "out").glob("*.png"))) == metrics["pairs"]
    with open(tmp_path / "out/skipped.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"bolt/1.png", "cog/2.png"}
    assert "truncated" in reasons["bolt/1.png"]
    assert "HTML" in reasons["cog/2.png"]
    assert "skipped 2 files" in result.stderr


@pytest.mark.parametrize(
    ("prepare", "exit_code", "words"),
    [
        ("rm -r apple bolt cog", 3, "one class only"),
        ("rm */1.png */2.png */3.png", 3, "one picture only"),
        ("rm -r *", 3, "no pictures"),
        ("mv */0.png . ; rm -r */", 3, "directly in the folder"),
        ("for f in */*.png; do echo x > $f; done", 3, "none of 16 pictures can be read"),
    ],
)
def test_folders_that_cannot_be_evaluated(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, prepare: str, exit_code: int, words: str
) -> None:
    subprocess.run(["bash", "-c", prepare], cwd=pictures, check=False, capture_output=True)
    result = run(siamese_eval, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert_refused(result, exit_code, words)
    assert contents(tmp_path / "out") == {}


def test_hostile_names_stay_data(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    # a new line, a terminal escape, a comma and a byte that is not UTF-8
    name = os.fsdecode(b'a\n\x1b[31m,"\xff')
    (pictures / "apple").rename(pictures / name)
    (pictures / name / "broken\x1b.png").write_text("x")
    result = run(siamese_eval, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    with open(tmp_path / "out/pairs.csv", newline="", errors="surrogateescape") as file:
        assert sum(row["left"].startswith(f"{name}/") for row in csv.DictReader(file)) >= 3


def test_damaged_bundle_and_checkpoint_as_bundle(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    make_bundle().write(tmp_path / "bundle")
    graph = bytearray((tmp_path / "bundle/head.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (tmp_path / "bundle/head.onnx").write_bytes(graph)
    out = tmp_path / "out"
    assert_refused(run(siamese_eval, "-v", pictures, "-o", out, "-c", tmp_path / "bundle"), 4, "head.onnx: damaged")
    (tmp_path / "best.pth").write_bytes(b"PK")
    assert_refused(run(siamese_eval, "-v", pictures, "-o", out, "-c", tmp_path / "best.pth"), 4, "siamese-train-eval")


def test_a_provider_that_cannot_run_is_exit_5(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    result = run(siamese_eval, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--provider", "tensorrt")
    assert_refused(result, 5, "provider tensorrt: ")
    command = [Path(sys.executable).with_name("siamese-eval"), "-v", pictures, "-o", tmp_path / "out"]
    command += ["-c", tiny_bundle, "--provider", "tensorrt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "")
    assert len(done.stderr.splitlines()) == 1  # ONNX Runtime's own warnings included


def test_options_are_checked_and_spelled_both_ways(run: RunCommand, pictures: Path, tiny_bundle: Path) -> None:
    assert run(siamese_eval, "--help").exit_code == 0
    assert_refused(run(siamese_eval, "--val-path", pictures), 2, "out_path")
    arguments = ("--val-path", pictures, "--out-path", pictures.parent / "out", "-c", tiny_bundle)
    assert_refused(run(siamese_eval, *arguments, "--provider", "gpu"), 2, "'gpu' is not one of")
    assert_refused(run(siamese_eval, *arguments, "--seed", "-1"), 2, "-1 is not in the range")
    assert run(siamese_eval, *arguments).exit_code == 0


def test_missing_onnxruntime_names_the_command_to_install_it(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from siamese_deploy.cli.eval import main; main()"
    command = [sys.executable, "-c", code, "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 5
    assert "pip install 'siamese-toolkit[cpu]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_the_folder_as_it_was(
    pictures: Path, tiny_bundle: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    for k in range(3000):  # enough to be met at work
        (pictures / f"apple/more{k}.png").symlink_to(pictures / "apple/0.png")
    out = tmp_path / "out"
    command = [Path(sys.executable).with_name("siamese-eval"), "-v", pictures, "-o", out, "-c", tiny_bundle]
    child = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(out.glob(".siamese-staging-*/*.png")):  # it has begun to draw
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == exit_code
    assert "Traceback" not in stderr
    assert contents(out) == {}


def test_moving_the_files_in_is_not_torn_by_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(names: dict[str, str]) -> None:
        with result_folder(tmp_path / "out") as staging:
            for name, text in names.items():
                (staging / name).write_text(text)

    write({"0.png": "old", "1.png": "old", "2.png": "old", "metrics.json": "old"})
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "0.png":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write({"0.png": "new", "1.png": "new", "metrics.json": "new"})
    found = contents(tmp_path / "out")
    assert {name: text for name, text in found.items() if not name.startswith(".")} == {
        "0.png": b"new", "1.png": b"new", "metrics.json": b"new",
    }  # fmt: skip


def test_a_crash_between_the_moves_leaves_no_metrics_and_every_file_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with result_folder(out) as staging:
        for name in ("0.png", "1.png", "metrics.json"):
            (staging / name).write_text("old")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "1.png":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="Input/output"), result_folder(out) as staging:
            for name in ("0.png", "1.png", "metrics.json"):
                (staging / name).write_text("new")
    assert not (out / "metrics.json").exists()
    with result_folder(out) as staging:  # the next run is not refused
        (staging / "metrics.json").write_text("newest")
    assert sorted(contents(out)) == [".siamese-evaluation", "metrics.json"]


def test_stale_staging_of_a_killed_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".siamese-staging-x").mkdir()
    (tmp_path / ".siamese-staging-x" / "0.png").touch()
    with result_folder(tmp_path):
        pass
    assert not list(tmp_path.glob(".siamese-staging-*"))


def test_output_among_the_pictures_is_refused(run: RunCommand, pictures: Path, tiny_bundle: Path) -> None:
    for out in (pictures, pictures / "results", pictures / "apple" / "deep"):
        result = run(siamese_eval, "-v", pictures, "-o", out, "-c", tiny_bundle)
        assert_refused(result, 2, "lies in the picture folder")
    assert sorted(os.listdir(pictures)) == ["apple", "bolt", "cog", "door"]


def test_output_paths_that_cannot_be_folders(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/sub", "dangling"):
        result = run(siamese_eval, "-v", pictures, "-o", tmp_path / name, "-c", tiny_bundle)
        assert_refused(result, 2, "is a file")
    assert_refused(run(siamese_eval, "-v", "x" * 300, "-o", tmp_path / "o", "-c", tiny_bundle), 2, "too long")


def test_output_that_is_not_utf8_does_not_end_in_an_error(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    command = [Path(sys.executable).with_name("siamese-eval"), "-v", pictures, "-o", out, "-c", tiny_bundle]
    done = subprocess.run([str(part) for part in command], capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    assert (Path(out) / "metrics.json").exists()


@given(st.floats(0, 1, width=32))
def test_scores_are_written_so_that_the_float32_comes_back(value: float) -> None:
    (text,) = shortest_float32(np.array([value], np.float32))
    assert np.float32(text) == np.float32(value)
    digits = len(text.partition("e")[0].replace(".", "").strip("0"))
    if digits > 1:  # one significant digit fewer would be another number
        assert np.float32(f"{value:.{digits - 2}e}") != np.float32(value)
