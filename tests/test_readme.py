"""The README's commands and program work as printed, and its output is what comes out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the language that stand under a "tested" comment."""
    return re.findall(rf"<!-- tested: [^>]*-->\n```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_commands_and_program_run_as_printed(tmp_path: Path) -> None:
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment = os.environ | own
    outputs = []
    for line in "".join(blocks("sh")).splitlines():
        command = shlex.split(line)
        if command[0] == "siamese-train":
            command[command.index("-e") + 1] = "1"
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        # with one epoch of training these may decide either way
        undecided = "verify" in command or "identify" in command
        assert done.returncode in ((0, 10) if undecided else (0,)), (command, done.stderr)
        outputs.append(done.stdout)
    printed_digests = re.findall(r"pair digest: (\w{64})", README)
    assert printed_digests
    for digest in printed_digests:  # these do not depend on how long it trained
        assert all(digest in output for output in outputs[3:5])
    assert len(list((tmp_path / "eval").glob("*.png"))) == 240
    (program,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0\.\d\d (same|different)\n", done.stdout)


def test_first_screen_has_the_two_commands_and_every_link_leads_somewhere() -> None:
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in README.splitlines()}
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_demo_of_the_makefile_is_the_one_of_the_readme() -> None:
    make = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    recipe = [line.strip() for line in make.splitlines() if line.startswith("\t$(BIN)/siamese")]
    recipe = [" ".join(line.replace("$(BIN)/", "").replace("demo/", "").split()) for line in recipe]
    assert recipe == blocks("sh")[0].splitlines()[:4]
