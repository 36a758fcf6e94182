"""Little memory, few descriptors, no home, odd masks and locales, clocks that jump, output that nobody takes."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, write_files

import siamese_deploy
from siamese_deploy.cli import main as siamese
from siamese_deploy.durable_files import folder_published_as
from siamese_deploy.embedding_cache import EmbeddingCache

SIAMESE = (sys.executable, "-c", "from siamese_deploy.cli import main; main()")
SOURCES = sorted(Path(siamese_deploy.__file__).parent.rglob("*.py"))


def apart(
    *arguments: object, before: Callable[[], object] = lambda: None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command with nothing but these variables in its environment; `before` is done in the child."""
    command = [*SIAMESE, *map(str, arguments)]
    where = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=where | environment, preexec_fn=before)


def limited(what: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (value, value))


def without_roots_powers() -> None:
    """Permissions count for root, too."""
    import ctypes

    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


# --- memory, descriptors, processors -------------------------------------------------------------------------------


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("command", [slow("eval"), "enrol"])
def test_64_descriptors_are_enough(tiny_bundle: Path, pictures: Path, tmp_path: Path, command: str) -> None:
    picture = (pictures / "apple/0.png").read_bytes()
    write_files(pictures, {f"many/{k}.png": picture + bytes(k + 1) for k in range(200)})
    arguments = {
        "eval": ("eval", "-v", pictures, "-o", tmp_path / "out"),
        "enrol": ("gallery", "enrol", tmp_path / "out", pictures, "--no_doubles"),
    }[command]
    done = apart(*arguments, "-c", tiny_bundle, before=limited(resource.RLIMIT_NOFILE, 64), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_no_descriptor_is_left_open(run: RunCommand, tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    def work(number: int) -> int:
        picture = pictures / "apple/0.png"
        options = ("-c", tiny_bundle, "--cache", tmp_path / "cache")
        assert run(siamese, "verify", picture, picture, *options, "--threshold", 0).exit_code == 0
        assert run(siamese, "verify", picture, tmp_path / "absent.png", *options).exit_code == 3
        assert run(siamese, "verify", picture, picture, "-c", tmp_path, "--no_cache").exit_code == 4
        enrolled = run(siamese, "gallery", "enrol", tmp_path / "g", picture, "--name", "a", *options)
        assert enrolled.exit_code == 0, enrolled.stderr
        assert run(siamese, "gallery", "identify", tmp_path / "g", picture, *options).exit_code in (0, 10)
        assert run(siamese, "eval", "-v", pictures, "-o", tmp_path / f"out{number}", *options).exit_code == 0
        return len(os.listdir("/proc/self/fd"))

    first = work(0)  # what is opened once for all stays open
    assert [work(number) for number in (1, 2)] == [first, first]


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", [4, 5, 6, 7, 8])
def test_too_few_descriptors_end_with_5(tiny_bundle: Path, pictures: Path, tmp_path: Path, descriptors: int) -> None:
    """The lowest number at which Python starts at all depends on the machine; whatever starts, ends well or with 5."""
    if apart(before=limited(resource.RLIMIT_NOFILE, descriptors)).returncode != 2:  # it cannot even say "usage"
        pytest.skip("Python does not start")
    arguments = ("gallery", "enrol", tmp_path / "g", pictures, "-c", tiny_bundle, "--no_cache")
    done = apart(*arguments, before=limited(resource.RLIMIT_NOFILE, descriptors))
    assert done.returncode in (0, 5), done.stderr
    assert done.returncode == 0 or "Too many open files" in done.stderr


@pytest.mark.parametrize("mebibytes", [150, 212, 4000, *map(slow, range(60, 260, 10))])
def test_little_memory_is_an_error_or_the_right_answer(tiny_bundle: Path, pictures: Path, mebibytes: int) -> None:
    """Libraries that find no memory while they are loaded have ends of their own (OpenBLAS: 1, or SIGINT)."""
    picture = pictures / "apple/0.png"
    arguments = ("verify", picture, picture, "-c", tiny_bundle, "--threshold", 0, "--no_cache", "--provider", "cpu")
    done = apart(*arguments, before=limited(resource.RLIMIT_AS, mebibytes * 2**20))
    if done.returncode == 0:
        assert done.stdout.startswith("match: score ")
    else:
        assert done.stdout == ""
        assert done.returncode not in (2, 3, 4, 10, 70), done.stderr
    assert mebibytes != 4000 or done.returncode == 0, done.stderr


def test_one_processor_gives_the_same_answer(tiny_bundle: Path, pictures: Path) -> None:
    pair = (pictures / "apple/0.png", pictures / "bolt/0.png")
    arguments = ("verify", *pair, "-c", tiny_bundle, "--threshold", 0, "--no_cache", "--provider", "cpu")
    one = {min(os.sched_getaffinity(0))}
    done = [apart(*arguments, before=before) for before in (lambda: None, lambda: os.sched_setaffinity(0, one))]
    assert [result.returncode for result in done] == [0, 0]
    assert done[0].stdout == done[1].stdout


# --- home, masks, locale, folders ----------------------------------------------------------------------------------


def modes(*roots: Path) -> set[str]:
    return {
        f"{path.stat().st_mode & 0o777:o} {'folder' if path.is_dir() else 'file'}"
        for root in roots
        for path in (root, *root.rglob("*"))
    }


@pytest.mark.parametrize("mask", [0o000, slow(0o077)])
def test_what_is_kept_is_for_its_owner_whatever_the_mask(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, mask: int
) -> None:
    home, gallery, out = tmp_path / "home", tmp_path / "gallery", tmp_path / "out"
    options = {"before": lambda: os.umask(mask), "HOME": str(home)}
    for arguments in (("gallery", "enrol", gallery, pictures), ("eval", "-v", pictures, "-o", out)):
        done = apart(*arguments, "-c", tiny_bundle, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
    assert modes(gallery, home / ".cache/siamese-toolkit/embeddings") == {"700 folder", "600 file"}
    assert modes(out) == {f"{0o777 & ~mask:o} folder", f"{0o666 & ~mask:o} file"}  # a result is the mask's business


@pytest.mark.parametrize(
    "environment",
    [
        {},
        slow({"HOME": ""}),
        slow({"HOME": "relative"}),
        slow({"HOME": "/proc/nowhere"}),
        slow({"HOME": "/dev/null"}),
        {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        slow({"LC_ALL": "nonsense"}),
    ],
    ids=["empty", "home-empty", "home-relative", "home-in-proc", "home-is-a-file", "no-place", "ascii", "no-locale"],
)
def test_an_odd_environment_costs_no_answer(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    name = os.fsdecode("Grüße ☃.png".encode())
    (pictures / "apple/0.png").rename(tmp_path / name)
    home = {"HOME": str(tmp_path / "home")} if "LC_ALL" in environment else {}
    arguments = ("verify", tmp_path / name, tmp_path / name, "-c", tiny_bundle, "--threshold", 0, "--provider", "cpu")
    done = apart(*arguments, **environment, **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("match: ")
    assert len(done.stderr.splitlines()) <= 1  # that nothing is cached
    absent = apart("verify", tmp_path / (name + "x"), tmp_path / name, "-c", tiny_bundle, **environment, **home)
    assert absent.returncode == 3
    assert "cannot be opened" in absent.stderr.splitlines()[-1]
    assert "Traceback" not in absent.stderr


def test_folders_that_may_not_be_written(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    """Everything read-only: an answer needs no file; what must write one says which."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o500)
    options = {"before": without_roots_powers, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    picture, locked = pictures / "apple/0.png", tmp_path / "home"
    try:
        verified = apart("verify", picture, picture, "-c", tiny_bundle, "--threshold", 0, **options)  # type: ignore[arg-type]
        assert verified.returncode == 0, verified.stderr
        assert "embeddings are not cached: " in verified.stderr
        for arguments in (("eval", "-v", pictures, "-o", locked / "out"), ("gallery", "enrol", locked / "g", pictures)):
            done = apart(*arguments, "-c", tiny_bundle, "--no_cache", **options)  # type: ignore[arg-type]
            assert done.returncode == 5, done.stderr
            assert "Permission denied" in done.stderr
            assert len(done.stderr.splitlines()) == 1
    finally:
        locked.chmod(0o700)
    assert os.listdir(locked) == []


# --- clocks --------------------------------------------------------------------------------------------------------


def test_nobody_measures_or_orders_by_the_wall_clock() -> None:
    """It jumps. It gives stamps for people, as text in UTC, and the age of what a killed run left, which only matters
    where nobody holds its lock."""
    clock = re.compile(r"time\.time(_ns)?\(|datetime\.(now|today|utcnow)|localtime|gmtime|strftime|date\.today")
    lines = [
        (str(path.relative_to(SOURCES[0].parent)), line.strip())
        for path in SOURCES
        for line in path.read_text("utf-8").splitlines()
        if clock.search(line)
    ]
    stamps = [line for line in lines if "datetime.now(timezone.utc).isoformat(" in line[1]]
    assert len(stamps) >= 2
    assert [line for line in lines if line not in stamps] == [
        ("durable_files.py", "if time.time() - folder.stat().st_mtime < _ABANDONED_AFTER_S:")
    ]


def test_a_clock_that_jumps_changes_neither_what_is_dropped_nor_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, chance = time.time(), random.Random(0)  # noqa: S311
    monkeypatch.setattr(time, "time", lambda: now + chance.choice((-1, 1)) * chance.random() * 10**9)
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=100_000)
    for number in range(120):
        vectors = np.full((1, 500), number, np.float32)
        cache.put_many([b"%032d" % number], vectors)
        for path in (tmp_path / "cache").iterdir():
            os.utime(path, (time.time(),) * 2)
        assert len(cache.get_many([b"%032d" % 0], 500)) == 1  # used each time, so never dropped
    kept = {int(key) for key in cache.get_many([b"%032d" % number for number in range(120)], 500)}
    assert kept == {0, *range(121 - len(kept), 120)}  # and of the others the newest are there
    for _ in range(20):
        with folder_published_as(tmp_path / "target", lambda _: None) as mine:
            os.utime(mine, (time.time(),) * 2)
            with folder_published_as(tmp_path / "target", lambda _: None):
                pass
            assert mine.exists()  # its lock says that it is no killed run's, whatever the dates say
    assert sorted(os.listdir(tmp_path)) == ["cache", "target"]


# --- output that nobody takes --------------------------------------------------------------------------------------


def test_a_match_that_cannot_be_written_is_none(tiny_bundle: Path, pictures: Path) -> None:
    picture = pictures / "apple/0.png"
    command = [*SIAMESE, "verify", picture, picture, "-c", tiny_bundle, "--threshold", "0", "--no_cache"]
    command += ["--provider", "cpu"]  # so that there is nothing to note on stderr
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1)
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("options", "exit_code"), [(("--debug", "-c", "nothing"), 3), slow(("-c", "nothing"), 3), (("--nonsense",), 2)]
)
def test_an_error_that_cannot_be_written_keeps_its_exit_code(
    pictures: Path, options: tuple[str, ...], exit_code: int
) -> None:
    with open("/dev/full", "w") as full:
        command = [*SIAMESE, "verify", *[pictures / "apple/0.png"] * 2, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (exit_code, "")


def test_without_stdout_and_stderr_the_exit_code_is_the_answer(tiny_bundle: Path, pictures: Path) -> None:
    def close_both() -> None:
        os.close(1)
        os.close(2)

    pair = (pictures / "apple/0.png", pictures / "bolt/1.png")
    for threshold, exit_code in ((0, 0), (1, 10)):
        arguments = ("verify", *pair, "-c", tiny_bundle, "--threshold", threshold, "--no_cache")
        command = [*SIAMESE, *map(str, arguments)]
        assert subprocess.run(command, stdin=subprocess.DEVNULL, preexec_fn=close_both).returncode == exit_code


def test_a_reader_that_goes_away_costs_nothing_that_was_written(
    tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*SIAMESE, "gallery", "enrol", tmp_path / "g", pictures, "-c", tiny_bundle, "--no_cache"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    # It ends with its first line, before anything is enrolled; started again, it does all of it.
    assert not (tmp_path / "g").exists()
