"""`--log`: every run is in it, and nothing else depends on it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import RunCommand, assert_refused, write_files

from siamese_deploy import OnnxVerifier
from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.command import Command
from siamese_deploy.cli.eval import main as siamese_eval
from siamese_deploy.cli.run_log import RunLog

TOOL = (
    "import click, sys, time; from siamese_deploy.cli.command import Command\n"
    "@click.command(cls=Command, name='tool')\n"
    "def main():\n    {}\n"
    "main()"
)


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text("ascii").splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_a_decision_from_start_to_end(run: RunCommand, tiny_bundle: Path, pictures: Path, log: Path) -> None:
    one, other = pictures / "apple/0.png", pictures / "cog/0.png"
    for threshold, exit_code in ((0.0123456, 0), (1, 10)):
        result = run(siamese, "verify", one, other, "-c", tiny_bundle, "--threshold", threshold, "--log", log)
        assert result.exit_code == exit_code
    match, no_match = lines_of(log)[:3], lines_of(log)[3:]
    assert [line["event"] for line in match] == [line["event"] for line in no_match]
    assert [line["event"] for line in match] == ["started", "decision", "finished"]
    assert all(line["command"] == "siamese verify" and line["pid"] == os.getpid() for line in match)
    assert all(line["time"].endswith("Z") and len(line["time"]) == 24 for line in match)
    assert match[0]["arguments"][:2] == [str(one), str(other)]
    assert (match[1]["decision"], "code" in match[1], match[2]["exit_code"]) == ("match", False, 0)
    assert (no_match[1]["decision"], no_match[1]["code"], no_match[2]["exit_code"]) == (
        "no match",
        "below-threshold",
        10,
    )
    assert f"score {match[1]['score']:.4f}, threshold 1.0000" in result.stdout
    assert round(match[1]["score"], 4) == match[1]["score"]  # no more digits than on the screen
    assert match[1]["threshold"] == 0.0123
    assert match[2]["provider"] == "cpu"
    assert len(match[2]["bundle_digest"]) == 64
    assert match[2]["seconds"] > 0
    assert log.stat().st_mode & 0o777 == 0o600


def test_an_error_has_its_code_and_no_traceback_unless_asked_for(run: RunCommand, tmp_path: Path, log: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ("-v", tmp_path / "empty", "-o", tmp_path / "o", "-c", tmp_path / "b", "--log", log)
    assert_refused(run(siamese_eval, *arguments), 3)
    failed = lines_of(log)[1]
    assert (failed["event"], failed["code"], failed["exit_code"]) == ("failed", "no-pictures", 3)
    assert failed["message"].startswith(f"{tmp_path / 'empty'}: no pictures in")
    assert "traceback" not in failed
    run(siamese_eval, *arguments, "--debug")
    assert "Traceback" in lines_of(log)[-1]["traceback"]


def test_what_cannot_be_parsed_is_in_the_log_too(run: RunCommand, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (("--sedd", 1), ("--seed", "x"), ("extra",), ()):
        assert_refused(run(siamese, "eval", *wrong, "--log", log), 2)
        assert [line["event"] for line in lines_of(log)] == ["started", "failed"]
        assert (lines_of(log)[1]["code"], lines_of(log)[1]["exit_code"]) == ("usage", 2)
        log.unlink()
    assert run(siamese, "verify", "a", "--help", "--log", log).exit_code == 2
    assert lines_of(log)[-1]["message"].startswith("nothing was decided")
    log.unlink()
    assert_refused(run(siamese, "eval", "--log", ""), 2, "--log", "is empty")
    assert run(siamese, "eval", "--help", "--log", log).exit_code == 0
    assert not log.exists()
    monkeypatch.setenv("SIAMESE_LOG", str(log))
    assert_refused(run(siamese, "verify", "--", "--log", "other"), 2)
    assert [line["event"] for line in lines_of(log)] == ["started", "failed"]


FAILING = [
    ("verify", "a", "b", "-c", "nowhere"),
    ("eval", "-v", "nowhere", "-o", "out", "-c", "nowhere"),
    ("gallery", "enrol", "g", "nowhere", "-c", "nowhere"),
    ("gallery", "list", "nowhere"),
    ("gallery", "remove", "nowhere", "x"),
    ("gallery", "identify", "nowhere", "a", "-c", "nowhere"),
    ("gallery", "export", "nowhere", "out"),
    ("gallery", "reembed", "nowhere", "-c", "nowhere"),
    ("bench", "nowhere", "--val_path", "nowhere"),
    ("check", "nowhere"),
    ("doctor", "nowhere"),
    ("cache", "stat", "--cache", "cache"),
    ("cache", "prune", "--cache", "cache"),
    ("cache", "clear", "--cache", "cache"),
    ("demo_data", "nowhere/out"),
]


@pytest.mark.parametrize("arguments", FAILING, ids=lambda arguments: "-".join(arguments[:2]))
def test_every_command_logs_its_failure_and_traces_it_on_demand(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache/embeddings.sqlite3").mkdir(parents=True)
    plain = run(siamese, *arguments, "--log", "log")
    assert_refused(plain, plain.exit_code)
    assert plain.exit_code in (2, 3, 4)
    started, failed = lines_of(tmp_path / "log")
    assert (started["event"], failed["event"], failed["exit_code"]) == ("started", "failed", plain.exit_code)
    assert failed["code"]
    assert failed["message"] in plain.stderr
    traced = run(siamese, *arguments, "--debug")
    assert traced.exit_code == plain.exit_code
    assert "Traceback (most recent call last)" in traced.stderr
    assert traced.stderr.endswith(plain.stderr)


def test_a_log_that_cannot_be_written_keeps_the_work_from_beginning(run: RunCommand, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for target, exit_code in (
        (tmp_path / "missing/log", 2),
        (tmp_path, 2),
        (tmp_path / "file/log", 2),
        (tmp_path / "pipe", 2),
        ("/dev/full", 5),
    ):
        result = run(siamese, "demo_data", tmp_path / "out", "--log", target)
        assert_refused(result, exit_code, f"siamese demo_data: --log {target}: cannot be written", "nothing was done")
        assert not (tmp_path / "out").exists()


LIMITED = (
    "import resource, sys\n"
    "from siamese_deploy.cli import main\n"
    "limit = int(sys.argv.pop(1))\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
    "main()"
)


def test_a_disk_that_fills_up_later_changes_no_answer(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path, log: Path
) -> None:
    arguments = ["verify", pictures / "apple/0.png", pictures / "apple/1.png", "-c", tiny_bundle, "--no_cache"]
    arguments += ["--provider", "cpu", "--log", log]
    expected = run(siamese, *arguments)
    size = len(log.read_text().splitlines()[0])
    for exit_code, threshold in ((0, "0.0"), (10, "1.0")):
        log.unlink()
        limit = size + len("--threshold") + 60  # somewhere in the second line
        command = [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments), "--threshold", threshold]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == exit_code, done.stderr
        assert expected.stdout.split("score")[1].split(",")[0] in done.stdout
        assert done.stderr == f"{log}: the log is incomplete (No space left on device); going on\n"
    assert log.stat().st_size == limit
    assert run(siamese, *arguments).exit_code in (0, 10)
    half = log.read_text().splitlines()
    assert [json.loads(line)["event"] for line in half[:1] + half[2:]] == ["started", "started", "decision", "finished"]
    with pytest.raises(ValueError, match=r"Unterminated|Expecting|Extra"):
        json.loads(half[1])


def test_processes_share_one_log(log: Path) -> None:
    code = (
        "import sys; from siamese_deploy.cli.run_log import RunLog\n"
        "log = RunLog(sys.argv[1], 'tool', [])\n"
        "for k in range(100): log.write('line', '', 'x' * 5000, {'k': k})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(log)]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    lines = lines_of(log)
    for child in children:
        own = [line for line in lines if line["pid"] == child.pid]
        assert [line.get("k") for line in own] == [None, *range(100)]


def test_a_log_that_is_moved_away_goes_on_under_its_name(log: Path) -> None:
    run_log = RunLog(str(log), "tool", [])
    log.rename(log.with_suffix(".1"))
    run_log.end(0)
    assert [line["event"] for line in lines_of(log.with_suffix(".1"))] == ["started"]
    assert [line["event"] for line in lines_of(log)] == ["finished"]


def test_names_of_any_bytes_come_back(run: RunCommand, tmp_path: Path, tiny_bundle: Path, log: Path) -> None:
    name = os.fsdecode(b"\xff\n\x1b[2J.png")
    run(siamese, "verify", tmp_path / name, tmp_path / name, "-c", tiny_bundle, "--log", log)
    started, failed = lines_of(log)
    assert os.fsencode(started["arguments"][0]).endswith(b"/\xff\n\x1b[2J.png")
    assert failed["code"] == "not-found"
    assert os.fsencode(failed["message"]).startswith(os.fsencode(tmp_path) + b"/\xff\n\x1b[2J.png: cannot be opened")


def test_what_is_skipped_and_refused(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path, log: Path
) -> None:
    write_files(pictures, {"apple/x.png": b"", "bolt/x.png": b"text", "bolt/y.png": b"\x89PNG\r\n\x1a\n half"})
    assert run(siamese, "eval", "-v", pictures, "-o", tmp_path / "o", "-c", tiny_bundle, "--log", log).exit_code == 0
    skipped = {line["path"]: line["code"] for line in lines_of(log) if line["event"] == "skipped"}
    with open(tmp_path / "o/skipped.csv", newline="") as file:
        listed = {str(pictures / row["path"]): row["code"] for row in csv.DictReader(file)}
    assert skipped == listed
    assert skipped[str(pictures / "apple/x.png")] == "picture-empty"
    assert set(skipped.values()) == {"picture-empty", "not-a-picture"}
    end = lines_of(log)[-1]
    assert (end["event"], end["files_skipped"], end["out_path"]) == ("finished", 3, str(tmp_path / "o"))

    log.unlink()
    gallery, first, second = tmp_path / "g", pictures / "apple/0.png", pictures / "apple/1.png"
    enrol = ("gallery", "enrol", gallery)
    assert run(siamese, *enrol, first, "--name", "apple", "-c", tiny_bundle, "--log", log).exit_code == 0
    assert run(siamese, *enrol, second, "--name", "apple", "-c", tiny_bundle, "--log", log).exit_code == 3
    assert lines_of(log)[-1]["code"] == "already-enrolled"
    assert run(siamese, *enrol, pictures, "-c", tiny_bundle, "--log", log).exit_code == 3
    (refused,) = [line for line in lines_of(log) if line["event"] == "refused"]
    assert (refused["name"], refused["code"]) == ("apple", "already-enrolled")
    log.unlink()
    result = run(
        siamese, "gallery", "identify", gallery, first, "-c", tiny_bundle, "--threshold", 0, "--log", log, "--json"
    )
    decision = lines_of(log)[1]
    answer = json.loads(result.stdout)
    assert (decision["event"], decision["decision"], decision["name"]) == ("decision", "match", answer["name"])
    assert ("code" in decision, answer["code"]) == (False, None)
    assert run(siamese, "gallery", "remove", gallery, "apple", "bolt", "cog", "door").exit_code == 0
    result = run(siamese, "gallery", "identify", gallery, first, "-c", tiny_bundle, "--log", log, "--json")
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (10, "gallery-empty")
    assert [line.get("code") for line in lines_of(log)[-2:]] == ["gallery-empty", None]


def test_an_interrupted_run_says_so(log: Path) -> None:
    code = TOOL.format("print('ready', flush=True); time.sleep(60)")
    for number, exit_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", code, "--log", str(log)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout
            child.stdout.readline()
            child.send_signal(number)
            assert child.wait(30) == exit_code
        end = lines_of(log)[-1]
        assert (end["event"], end["code"], end["exit_code"]) == ("failed", "interrupted", exit_code)


def test_on_stderr(log: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOOL.format("print('answer')"), "--log", "-"], capture_output=True, text=True
    )
    assert done.stdout == "answer\n"
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["started", "finished"]


def test_a_run_that_only_looks_finished_is_logged_as_what_it_was(run: RunCommand, log: Path) -> None:
    @click.command(cls=Command, name="tool")
    def tool() -> None:
        sys.exit(0)

    assert run(tool, "--log", log).exit_code == 70
    assert (lines_of(log)[-1]["event"], lines_of(log)[-1]["code"]) == ("failed", "internal-error")


def test_the_library_writes_no_log_and_keys_are_never_in_it(
    run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIAMESE_LOG", str(log))
    OnnxVerifier(tiny_bundle).compare(pictures / "apple/0.png", tmp_path / pictures / "apple/1.png")
    assert not log.exists()
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\nVERYSECRET\n-----END PRIVATE KEY-----\n")
    result = run(siamese, "verify", "a", "b", "-c", tiny_bundle, "--verify_key", tmp_path / "key.pem", "--debug")
    assert lines_of(log)[-1]["code"] in ("key-unusable", "package-missing")
    assert "VERYSECRET" not in log.read_text() + result.stderr
