"""Exit codes and the one line on stderr, whatever a command meets."""

from __future__ import annotations

import errno
import subprocess
import sys

import click
import pytest
from conftest import RunCommand, assert_refused

from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.command import Command
from siamese_deploy.errors import (
    AccuracyError,
    BusyError,
    EnvironmentFault,
    InputDataError,
    IntegrityError,
    MissingExtraError,
    SiameseError,
    UsageError,
    needs_extra,
)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def failing(error: BaseException) -> click.Command:
    @click.command(cls=Command, name="tool")
    @click.option("--long_name", type=int, default=0)
    def tool(long_name: int) -> None:
        raise error

    return tool


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (SiameseError("x"), 70, "tool: x"),
        (UsageError("x"), 2, "tool: x"),
        (InputDataError("x"), 3, "tool: x"),
        (IntegrityError("x"), 4, "tool: x"),
        (EnvironmentFault("x"), 5, "tool: x"),
        (BusyError("busy"), 6, "tool: busy"),
        (AccuracyError("x"), 11, "tool: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "out of memory"),
        (OutOfMemoryError(), 5, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5, "out of memory"),
        (RuntimeError("can't start new thread"), 5, "no further thread can be started"),
        (
            ImportError("libzstd.so.1: failed to map segment from shared object"),
            5,
            "a library cannot be loaded: libzstd",
        ),
        (ImportError("cannot import name 'x' from 'y'"), 70, "internal error: ImportError"),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 5, "file: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a\nb"), 5, "a\\nb: Permission denied"),
        (ValueError("surprise\nin two lines"), 70, "internal error: ValueError"),
        (FileNotFoundError(errno.ENOENT, "No such file"), 70, "internal error"),
    ],
)
def test_errors_have_their_exit_code_and_one_line(
    run: RunCommand, error: BaseException, exit_code: int, words: str
) -> None:
    assert_refused(run(failing(error)), exit_code, words)


def test_an_error_has_the_code_of_its_kind_or_its_own() -> None:
    assert EnvironmentFault("x").code == "environment"
    assert EnvironmentFault("x", code="disk-full").code == "disk-full"


def test_debug_shows_the_traceback(run: RunCommand) -> None:
    result = run(failing(ValueError("surprise")), "--debug")
    assert "Traceback" in result.stderr
    assert result.exit_code == 70


def test_usage_errors_are_one_line_too(run: RunCommand) -> None:
    assert_refused(run(failing(ValueError()), "--long_name", "x"), 2, "'x' is not a valid integer", "--help")
    assert_refused(run(failing(ValueError()), "--lone_name", "1"), 2, "--long_name")
    assert_refused(run(failing(ValueError()), "extra"), 2, "unexpected extra argument")
    assert_refused(run(siamese, "eval", "--seed", "x"), 2, "siamese eval: ", "--seed")
    assert_refused(run(siamese, "bogus"), 2, "siamese: No such command 'bogus'")
    assert_refused(run(siamese, "--nope"), 2, "--nope")
    assert run(siamese, "demo-data", "--help").exit_code == 0
    assert_refused(run(failing(KeyError("hyphens are fine")), "--long-name", 1), 70, "hyphens are fine")


def test_a_reader_that_goes_away_is_no_traceback(tiny_bundle: object) -> None:
    code = (
        "import click, sys; from siamese_deploy.cli.command import Command\n"
        "@click.command(cls=Command)\n"
        "def main():\n"
        "    for _ in range(100_000): click.echo('line')\n"
        "main()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(30) == 141


def test_a_cpu_build_of_torch_with_the_published_torchvision_is_explained() -> None:
    with pytest.raises(MissingExtraError, match="does not fit the installed torch"), needs_extra("train"):
        raise RuntimeError("operator torchvision::nms does not exist")
    with pytest.raises(RuntimeError, match="something else"), needs_extra("train"):
        raise RuntimeError("something else")
    with pytest.raises(EnvironmentFault, match=r"libcublas\.so"), needs_extra("cpu"):
        raise ImportError("libcublas.so.12: cannot open shared object file")
    with pytest.raises(ModuleNotFoundError), needs_extra("train"):
        import a_module_of_ours_that_is_missing  # type: ignore[import-not-found]  # noqa: F401


def test_errors_of_loading_workers_survive_the_way_to_the_parent() -> None:
    import pickle

    from siamese_deploy.errors import ImageError

    error = pickle.loads(pickle.dumps(ImageError("a.png", "empty file")))  # noqa: S301
    assert (str(error), error.path, error.reason) == ("a.png: empty file", "a.png", "empty file")
