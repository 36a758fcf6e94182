from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import Result
from conftest import RunCommand, assert_refused
from PIL import Image

from siamese_deploy import OnnxVerifier
from siamese_deploy.bench import bundles
from siamese_deploy.cli import main as siamese
from siamese_deploy.verifier import Embeddings, Scores

SIAMESE = (sys.executable, "-c", "from siamese_deploy.cli import main; main()")
QUICK = ("--min_seconds", 0.003, "--gallery_rows", 10)
FILES = ["bench.json", "bench.md", "bench.png"]
NO_CUDA = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()

Bench = Callable[..., Result]


@pytest.fixture
def bench(run: RunCommand, pictures: Path, tiny_bundle: Path) -> Bench:
    return lambda *options: run(siamese, "bench", tiny_bundle, "-v", pictures, *QUICK, *options)


def content(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "bench.json").read_text("ascii"))
    return value


def test_writes_what_it_prints(bench: Bench, tmp_path: Path) -> None:
    result = bench("-o", tmp_path / "out", "--batch", 2, "--batch", 8, "--threads", 2, "--pairs", 5)
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    written = content(tmp_path / "out")
    assert (written["format"], written["complete"]) == ("siamese-bench/1", True)
    assert written["workload"]["pairs"] == 5
    assert (written["machine"]["threads"], written["settings"]["batches"]) == (2, [2, 8])
    rows = written["rows"]
    assert [row["batch"] for row in rows if row["scenario"] == "Offline"] == [2, 8]
    assert all(row["status"] in ("ok", "unstable") for row in rows)
    printed = result.stdout.splitlines()
    for row, line in zip(rows, printed[1:], strict=False):
        assert line.split()[:3] == ["tiny", "fp32", "cpu"]
        assert row["scenario"] in line
    page = (tmp_path / "out/bench.md").read_text()
    assert page.count("\n| tiny |") == len(rows) + 1
    with Image.open(tmp_path / "out/bench.png") as picture:
        assert picture.format == "PNG"
    assert bench("-o", tmp_path / "out").exit_code == 0  # its own files are replaced
    assert len(content(tmp_path / "out")["rows"]) == len(rows) - 1


def test_a_p99_needs_662_queries(bench: Bench, tmp_path: Path, pictures: Path) -> None:
    for file in pictures.glob("*/*.png"):
        Image.new("RGB", (8, 8)).save(file)

    def latencies(*options: object) -> list[dict[str, Any]]:
        assert bench("-o", tmp_path / "out", "--min_seconds", 0, *options).exit_code == 0
        return content(tmp_path / "out")["rows"][:2]

    for row in latencies():
        assert row["queries"] < 64
        assert (row["latency_ms"]["p90"], row["latency_ms"]["p99"]) == (None, None)
        assert row["not_computed"]["p99"] == f"too few queries ({row['queries']} of 662)"
    assert "p90: too few queries (" in bench("--min_seconds", 0).stdout
    for row in latencies("--queries", 64):
        assert row["queries"] >= 64
        assert row["latency_ms"]["p90"] >= row["latency_ms"]["p50"]
    single, multi = latencies("--full")
    assert min(single["queries"], multi["queries"]) >= 662
    assert single["latency_ms"]["p99"] >= single["latency_ms"]["p90"]
    assert single["not_computed"] == {}


@pytest.mark.skipif(not NO_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_row_that_fails_stays_and_only_none_left_is_a_failure(bench: Bench, tmp_path: Path) -> None:
    result = bench("--provider", "cuda", "--provider", "cpu", "--batch", 9, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    first, *others = content(tmp_path / "out")["rows"]
    assert (first["provider"], first["scenario"], first["status"]) == ("cuda", "all", "failed")
    assert "no CUDAExecutionProvider" in first["reason"]
    assert {row["provider"] for row in others} == {"cpu"}
    (too_large,) = (row for row in others if row["scenario"] == "Offline")
    assert (too_large["status"], too_large["latency_ms"], too_large["images_per_s"]) == ("failed", {}, None)
    assert "expected 1 to 8" in too_large["reason"]
    result = bench("--provider", "cuda")
    assert_refused(result, 5, "no row worked", "no CUDAExecutionProvider")
    assert "failed: provider cuda" in result.stdout


class OffForOnePair(OnnxVerifier):
    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        scores = super().score(left, right)
        return scores + np.float32(5e-6) if len(scores) == 1 else scores


def test_other_scores_than_the_evaluations_end_with_4(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "OnnxVerifier", OffForOnePair)
    result = bench("-o", tmp_path / "out")
    assert_refused(result, 4, "1 rows are wrong", "SingleStream", "scores differ")
    assert [row["status"] == "wrong" for row in content(tmp_path / "out")["rows"]] == [True, *[False] * 4]
    assert "wrong: scores differ" in result.stdout


def rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    value = json.loads(file.read_text())
    change(value)
    changed = file.with_name("baseline.json")
    changed.write_text(json.dumps(value))
    return changed


def scaled(factor: float, *scenarios: str) -> Callable[[dict[str, Any]], None]:
    """As if the baseline's machine had taken `factor` times as long."""

    def change(value: dict[str, Any]) -> None:
        for row in value["rows"]:
            if row["scenario"] in scenarios:
                for window in row["windows"]:
                    window["p50_ms"] *= factor
                    window["queries_per_s"] /= factor

    return change


ALL = ("SingleStream", "MultiStream", "Offline")


def test_the_gate_trips_for_each_scenario_and_only_for_slower(bench: Bench, tmp_path: Path) -> None:
    assert bench("-o", tmp_path / "out").exit_code == 0
    earlier = tmp_path / "out/bench.json"
    # On a busy machine times differ by much; a thousand times as fast or slow is neither noise nor a race.
    slower = rewrite(earlier, scaled(1000, *ALL))
    result = bench("--baseline", slower, "--max_regression", "10%")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split(":")[1].split()[2] for line in result.stdout.splitlines() if "baseline: " in line] == [*ALL]
    for scenario in ALL:
        faster = rewrite(earlier, lambda value, one=scenario: (scaled(1000, *ALL)(value), scaled(1e-6, one)(value)))  # type: ignore[misc]
        result = bench("--baseline", faster, "--max_regression", "10")
        assert_refused(result, 11, "1 of 3 rows are slower by more than 10%", scenario)
    assert bench("--baseline", faster).exit_code == 0  # told, not judged
    others = rewrite(earlier, scaled(1e-6, "cached pairs", "identify"))
    assert bench("--baseline", others, "--max_regression", "100000%").exit_code == 0


def test_a_burst_of_noise_in_the_baseline_is_none_of_ours(bench: Bench, tmp_path: Path) -> None:
    assert bench("-o", tmp_path / "out").exit_code == 0

    def burst(value: dict[str, Any]) -> None:
        scaled(1000, *ALL)(value)
        for row in value["rows"][:3]:
            row["windows"][0] = {"p50_ms": 1e-9, "queries_per_s": 1e9}

    file = rewrite(tmp_path / "out/bench.json", burst)
    assert bench("--baseline", file, "--max_regression", "10%").exit_code == 0


@pytest.mark.skipif(not NO_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_row_that_no_longer_works_is_a_regression(bench: Bench, tmp_path: Path) -> None:
    assert bench("-o", tmp_path / "out").exit_code == 0

    def worked_on_cuda(value: dict[str, Any]) -> None:
        scaled(1000, *ALL)(value)
        value["rows"].append(value["rows"][0] | {"provider": "cuda"})
        value["machine"]["gpu"] = None

    file = rewrite(tmp_path / "out/bench.json", worked_on_cuda)
    options = ("--provider", "cpu", "--provider", "cuda", "--baseline", file, "--max_regression", "10%")
    assert_refused(bench(*options), 11, "cuda", "worked in the baseline")


def test_baselines_that_say_nothing_about_this_run_are_refused(bench: Bench, tmp_path: Path) -> None:
    assert bench("-o", tmp_path / "out").exit_code == 0
    earlier = tmp_path / "out/bench.json"
    gate = ("--max_regression", "10%", "--baseline")

    def machine(value: dict[str, Any]) -> None:
        value["machine"]["cpu"] = "Another CPU"
        scaled(1000, *ALL)(value)

    moved = rewrite(earlier, machine)
    assert_refused(bench(*gate, moved), 2, "another machine (cpu Another CPU instead of", "--any_machine")
    assert bench(*gate, moved, "--any_machine").exit_code == 0
    for name in ("cores", "threads"):
        other = rewrite(earlier, lambda value, one=name: value["machine"].update({one: 999}))  # type: ignore[misc]
        assert_refused(bench(*gate, other), 2, f"{name} 999")
    assert_refused(bench(*gate, earlier, "--pairs", 3, "--any_machine"), 2, "other pairs of pictures")

    def of_other_bundle(value: dict[str, Any]) -> None:
        for row in value["rows"]:
            row["bundle_digest"] = "0" * 64

    assert_refused(bench(*gate, rewrite(earlier, of_other_bundle)), 3, "no row in common")
    assert_refused(bench(*gate, earlier, "-o", tmp_path / "out"), 2, "would replace the baseline")
    assert_refused(bench(*gate, tmp_path / "absent"), 3, "No such file")
    assert_refused(bench("--max_regression", "10%"), 2, "--baseline")
    assert_refused(bench("--any_machine"), 2, "--baseline")


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.update(format="siamese-bench/2"),
        lambda value: value.pop("format"),
        lambda value: value.pop("machine"),
        lambda value: value["machine"].pop("cores"),
        lambda value: value.pop("workload"),
        lambda value: value.update(rows={}),
        lambda value: value["rows"].insert(0, 7),
        lambda value: value["rows"][0].pop("windows"),
        lambda value: value["rows"][0].update(windows=[]),
        lambda value: value["rows"][0]["windows"][0].update(p50_ms=0),
        lambda value: value["rows"][0]["windows"][0].update(p50_ms=float("nan")),
        lambda value: value["rows"][0]["windows"][0].update(queries_per_s="1"),
        lambda value: value["rows"][0].update(batch=[2]),
    ],
)
def test_a_damaged_baseline_is_refused(
    run: RunCommand, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    row = {
        "bundle_digest": "0" * 64, "provider": "cpu", "scenario": "SingleStream", "batch": 2, "status": "ok",
        "windows": [{"p50_ms": 1.0, "queries_per_s": 1000}],
    }  # fmt: skip
    sound = {
        "format": "siamese-bench/1",
        "machine": {"cpu": "x", "cores": 2, "threads": 2, "gpu": None},
        "workload": {"pair_digest": "0"},
        "rows": [row],
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(sound))
    options = ("bench", tmp_path / "absent", "-v", tmp_path, "--baseline")
    assert_refused(run(siamese, *options, file), 3, "no such bundle")  # comes after the baseline was read
    assert_refused(run(siamese, *options, rewrite(file, damage)), 4, "baseline.json: damaged, or not the bench.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "[" * 100_000, "\x00"])
def test_a_foreign_baseline_is_refused(run: RunCommand, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    result = run(siamese, "bench", tmp_path, "-v", tmp_path, "--baseline", tmp_path / "x.json")
    assert_refused(result, 4, "x.json: damaged, or not the bench.json")


def test_wrong_options_end_before_anything_is_measured(bench: Bench, tmp_path: Path, pictures: Path) -> None:
    for name, value in (("min_seconds", "nan"), ("min_seconds", -1), ("max_regression", "x"), ("pairs", 0)):
        assert_refused(bench(f"--{name}", value), 2, name)
    assert_refused(bench("--max_regression", "nan", "--baseline", tmp_path / "x"), 2, "percentage")
    assert_refused(bench("--provider", "auto"), 2, "auto")
    assert_refused(bench("-o", pictures / "out"), 2, "lies in the picture folder")
    (tmp_path / "file").write_bytes(b"x")
    assert_refused(bench("-o", tmp_path / "file"), 2, "is a file")


def test_missing_inputs_have_their_own_codes(run: RunCommand, pictures: Path, tiny_bundle: Path) -> None:
    assert_refused(run(siamese, "bench", pictures / "absent", "-v", pictures), 3, "no such bundle")
    assert_refused(run(siamese, "bench", tiny_bundle, pictures, "-v", pictures), 4, "is no bundle")
    assert_refused(run(siamese, "bench", tiny_bundle, "-v", pictures / "absent"), 3, "no such folder")
    assert_refused(run(siamese, "bench", "-v", pictures), 2, "BUNDLE")


@pytest.mark.parametrize("name", FILES)
def test_files_of_others_are_not_replaced(bench: Bench, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"format": "mine"}')
    assert_refused(bench("-o", tmp_path / "out"), 2, name, "no bench.json that siamese bench wrote")
    assert (tmp_path / "out" / name).read_text() == '{"format": "mine"}'
    assert os.listdir(tmp_path / "out") == [name]


def test_a_hostile_bundle_name_is_only_a_name(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / os.fsdecode(b"a|b\n<i>\x1b[31m\xff=1+1")
    hostile.symlink_to(tiny_bundle)
    result = run(siamese, "bench", hostile, "-v", pictures, *QUICK, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert "\\x1b[31m" in result.stdout
    assert {row["bundle"] for row in content(tmp_path / "out")["rows"]} == {hostile.name}
    page = (tmp_path / "out/bench.md").read_text("utf-8")
    assert "\x1b" not in page
    assert "<i>" not in page.replace("\\<", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_finished_rows(
    number: signal.Signals, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # tqdm shows nothing on no columns
    # The last row takes seconds; the others are done when the progress display comes to it.
    quick = ("--min_seconds", "0.003", "--gallery_rows", "10", "--gallery_rows", str(3 * 10**6))
    command = (*SIAMESE, "bench", tiny_bundle, "-v", pictures, *quick, "-o", out)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        while b"5/6" not in shown:
            shown += os.read(ours, 10_000)
        process.send_signal(number)
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 128 + number
    written = content(out)
    assert written["complete"] is False
    assert [row["scenario"] for row in written["rows"]] == [*ALL, "cached pairs", "identify"]
    assert "Incomplete" in (out / "bench.md").read_text()
    assert sorted(os.listdir(out)) == FILES
    assert printed.count("tiny ") == 6
