"""`--log` and `--debug` of the commands that need PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from conftest import RunCommand, assert_refused

from siamese_export.cli import main as export_main
from siamese_train.cli import train_bench_main, train_eval_main, train_main

PICTURES = ("--val_path", "nowhere")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train_main, ("--train_path", "nowhere", *PICTURES, "-o", "out")),
        (train_eval_main, (*PICTURES, "-o", "out", "-c", "nowhere.pth")),
        (train_bench_main, (*PICTURES, "-c", "nowhere.pth")),
        (export_main, ("-c", "nowhere.pth", "-o", "out")),
        (export_main, ("--show", "nowhere")),
    ],
    ids=lambda value: value.name if isinstance(value, click.Command) else "",
)
def test_every_command_logs_its_failure_and_traces_it_on_demand(
    run: RunCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: click.Command,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = run(command, *arguments, "--log", "log")
    assert_refused(plain, 3)
    started, failed = map(json.loads, (tmp_path / "log").read_text("ascii").splitlines())
    assert (started["event"], failed["event"], failed["exit_code"]) == ("started", "failed", 3)
    assert failed["code"] == "not-found"
    assert failed["message"] in plain.stderr
    traced = run(command, *arguments, "--debug")
    assert "Traceback (most recent call last)" in traced.stderr
    assert traced.stderr.endswith(plain.stderr)
