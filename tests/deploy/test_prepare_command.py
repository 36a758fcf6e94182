from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest
from conftest import RunCommand, assert_refused
from tiny_bundle import make_bundle

from siamese_deploy.cli import main as siamese
from siamese_deploy.providers import ORT_NAMES

SIAMESE = (sys.executable, "-c", "from siamese_deploy.cli import main; main()")
NO_TENSORRT = ORT_NAMES["tensorrt"] not in onnxruntime.get_available_providers()


def test_the_cpu_has_nothing_to_prepare_beyond_starting(run: RunCommand, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(siamese, "prepare", tiny_bundle, "--provider", "cpu", "--max-batch", 4)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("cpu: nothing to prepare; the bundle starts here (")
    assert not (tmp_path / "xdg-cache/siamese-toolkit").exists()


def test_a_bundle_that_does_not_start_is_not_said_to(run: RunCommand, tiny_bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    make_bundle(lambda model: model.graph.node.pop()).write(bad)
    assert_refused(run(siamese, "prepare", bad, "--provider", "cpu"), 4, "refuses it on cpu")
    assert_refused(run(siamese, "prepare", tiny_bundle, "--provider", "cpu", "--max_batch", 9), 2, "max_batch")


def test_wrong_arguments_end_before_anything_is_opened(run: RunCommand, tiny_bundle: Path) -> None:
    assert_refused(run(siamese, "prepare"), 2, "BUNDLE")
    assert_refused(run(siamese, "prepare", tiny_bundle, "--provider", "auto"), 2, "auto")
    assert_refused(run(siamese, "prepare", tiny_bundle, "--max_batch", 0), 2, "max_batch")


@pytest.mark.skipif(not NO_TENSORRT, reason="this ONNX Runtime has TensorRT")
def test_without_tensorrt_one_line_says_so(run: RunCommand, tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(siamese, "prepare", tiny_bundle)
    assert_refused(result, 5, "provider tensorrt", "TensorrtExecutionProvider")
    assert result.stdout == ""
    assert not (tmp_path / "xdg-cache/siamese-toolkit").exists()


def test_a_clock_runs_where_somebody_watches(tiny_bundle: Path) -> None:
    ours, theirs = pty.openpty()
    command = (*SIAMESE, "prepare", str(tiny_bundle), "--provider", "cpu")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert "nothing to prepare" in process.stdout.read()
    shown = os.read(ours, 10_000)
    assert b"\r\x1b[Kopening on cpu: 0 s" in shown
    assert shown.endswith(b"\r\x1b[K")  # and nothing of it stays
    os.close(ours)
    assert process.returncode == 0


def script_whose_child_does(folder: Path, statement: str, provider: str = "cpu") -> Path:
    """`siamese prepare`, where the process that opens the bundle does something else instead."""
    script = folder / "script.py"
    script.write_text(
        "import os, pathlib, signal, time\n"
        "from siamese_deploy.cli import main\n"
        "if __name__ == '__mp_main__':\n"
        f"    {statement}\n"
        "if __name__ == '__main__':\n"
        f"    main(['prepare', {str(folder)!r}, '--provider', {provider!r}])\n"
    )
    return script


def test_a_builder_that_is_killed_is_an_environment_fault(tmp_path: Path) -> None:
    script = script_whose_child_does(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    result = subprocess.run((sys.executable, script), capture_output=True, text=True)
    assert result.returncode == 5
    assert len(result.stderr.splitlines()) == 1
    assert "ended by itself (exit code -9; -9 means out of memory); free memory" in result.stderr


STAND_IN = """
from pathlib import Path
import siamese_deploy.bundle
import siamese_deploy.runtime
from siamese_deploy.engine_cache import default_engine_root, engine_folder
from siamese_deploy.tensorrt import EngineKey

class Verifier:
    provider_note = "a note for the user"

    def __init__(self, bundle, provider, max_batch, say=None):
        for graph in sorted(Path(bundle).glob("*.onnx")):
            key = EngineKey("ab", graph.stem, "gpu", "driver", "10.3.0", "1.23.2", "fp32", (1, 4, 8))
            with engine_folder(default_engine_root(), key, say=print) as folder:
                if not folder.ready:
                    (folder.path / "x.engine").write_bytes(b"engine")

siamese_deploy.bundle.read_bundle = lambda path, **_: path
siamese_deploy.runtime.OnnxVerifier = Verifier
"""


def assert_counts(end: tuple[int, str], built: int, there: int) -> None:
    assert end[0] == 0
    assert end[1].startswith(f"tensorrt: engines built: {built}, there already: {there}; "), end[1]


def test_says_what_was_built_and_what_was_there(tmp_path: Path) -> None:
    """With a stand-in that keeps engines as a verifier does; real ones need a GPU."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    script = script_whose_child_does(tmp_path, "import stand_in", "tensorrt")

    def prepare() -> tuple[int, str]:
        result = subprocess.run((sys.executable, script), capture_output=True, text=True)
        first, *more = result.stderr.splitlines()
        assert first == "a note for the user"
        return result.returncode, "".join(more) + result.stdout

    exit_code, line = prepare()
    assert exit_code == 5
    assert "no engine was kept; every start will build it again" in line
    (tmp_path / "backbone.onnx").touch()
    assert_counts(prepare(), built=1, there=0)
    (tmp_path / "head.onnx").touch()
    assert_counts(prepare(), built=1, there=1)
    assert_counts(prepare(), built=0, there=2)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_at_once_even_while_a_session_opens(tmp_path: Path, number: int, exit_code: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = script_whose_child_does(
        tmp_path, f"pathlib.Path({str(pipe)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    with subprocess.Popen((sys.executable, script), stderr=subprocess.PIPE, text=True) as process:
        child = int(pipe.read_text())
        os.kill(child, signal.SIGINT)  # a terminal sends it to both; only the parent answers
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(number)
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert process.returncode == exit_code
    assert len(lines) <= 1, lines
