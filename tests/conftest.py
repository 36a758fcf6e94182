from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from siamese_deploy.demo_data import draw_character

# Two threads, as with one a sum has only one order; asleep while they wait, as the suite's processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A suite started in the background has Ctrl-C ignored, which the code under test rightly respects.
signal.signal(signal.SIGINT, signal.default_int_handler)

CLASSES = ("apple", "bolt", "cog", "door")
DRAWINGS = 4

RunCommand = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or the user, has in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("drawn")
    pictures = {}
    for k, name in enumerate(CLASSES):
        for n in range(DRAWINGS):
            file = folder / f"{name}{n}.png"
            draw_character(k, n).resize((40, 48)).save(file)
            pictures[f"{name}/{n}.png"] = file.read_bytes()
    return pictures


@pytest.fixture
def pictures(tmp_path: Path, _drawn: dict[str, bytes]) -> Path:
    """A fresh folder of 4 classes with 4 small pictures each."""
    root = tmp_path / "pictures"
    write_files(root, _drawn)
    return root


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle folder to read, not to change."""
    from tiny_bundle import make_bundle

    path = tmp_path_factory.mktemp("bundles") / "tiny"
    make_bundle().write(path)
    return path


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with another first layer of its head, and so with other scores."""
    import numpy as np
    import tiny_bundle as recipe
    from onnx import numpy_helper

    build = recipe._head

    def changed():  # type: ignore[no-untyped-def]
        model = build()
        weight = next(item for item in model.graph.initializer if item.name == "w1")
        noise = np.random.RandomState(9).normal(0, 0.001, tuple(weight.dims)).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(noise, "w1"))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_head", changed)
        made = recipe.make_bundle()
    folder = tmp_path_factory.mktemp("bundles") / "other"
    made.write(folder)
    return folder


@pytest.fixture
def run() -> RunCommand:
    """Run a command in this process: run(main, "-v", path, ...) -> result with exit_code, stdout, stderr."""

    def invoke(command: click.Command, *arguments: object) -> Result:
        return CliRunner().invoke(command, [str(argument) for argument in arguments])

    return invoke


def assert_refused(result: Result, exit_code: int, *words: str) -> None:
    """One line on stderr with these words, the exit code, and no traceback."""
    assert result.exit_code == exit_code, (result.exit_code, result.stderr, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in result.stderr, (word, result.stderr)
