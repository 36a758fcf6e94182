"""Runs protocols in forks of one warm process, with or without the shim between them and the disk.

As a program (`python -m crash.worker`): a job in JSON on each line of stdin, an answer on each line of stdout. The
class `Worker` is its other end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from siamese_deploy.cli.command import Command

_TESTS = Path(__file__).resolve().parents[1]
SHORT_WRITE = -1


@dataclass(frozen=True)
class Job:
    protocol: str
    root: str
    first: int
    last: int
    """Steps first ... last - 1; they end with the first that fails."""
    rows: int = 3
    recover: bool = False
    """Do what the next writer does, and no step."""
    log: str = ""
    """Where the shim writes what it sees; without it nothing is recorded and nothing fails."""
    fail_at: int = 0
    """Number of the call that fails, from 1 on; 0: none."""
    fail_errno: int = 0
    fail_for_ever: bool = False
    fail_reads: bool = False
    sabotage: str = ""
    """What is taken out of the code first, see sabotage.py."""
    board: str = ""
    """A file that outlives a kill, for `Board`."""


@dataclass(frozen=True)
class Outcome:
    done: int
    """Steps that were acknowledged, the ones before the job included."""
    exit_code: int
    """Of the first that was not, as the command line would give it; 0 if all were."""
    message: str
    failed: str
    """Kinds of the calls that were made to fail: o open, w write, s sync, r rename, u unlink, R read, ..."""


def compiled_shim(folder: Path) -> Path:
    """The shared library; raises where there is no C compiler, as these tests are not to be passed over in silence."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise RuntimeError("the crash tests need a C compiler (Debian: apt-get install gcc libc6-dev)")
    shim = folder / "io_shim.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", shim, Path(__file__).with_name("io_shim.c")], check=True)
    return shim


class Worker:
    """One process that forks; `shim` stands between its forks and the disk."""

    def __init__(self, bundle: Path, shim: Path | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_TESTS), "SIAMESE_CRASH_BUNDLE": str(bundle)}
        environment |= {"LD_PRELOAD": str(shim)} if shim else {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crash.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, job: Job) -> Outcome:
        self.start(job)
        answer = self._answer()
        assert "done" in answer, answer
        return Outcome(**answer)

    def start(self, job: Job) -> int:
        """The process that does the job; `ended` must be called next."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        return int(self._answer()["pid"])

    def ended(self) -> dict[str, Any]:
        """What became of it: an `Outcome`, or the signal that killed it."""
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the worker died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Board:
    """What a process says of itself in a mapped file, which a kill cannot take back: a byte and two numbers."""

    def __init__(self, path: Path) -> None:
        import mmap

        if not path.exists():
            path.write_bytes(bytes(24))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 24)

    def _number(self, at: int) -> int:
        return int.from_bytes(self._map[at : at + 8], "little")

    def begin(self) -> None:
        self._map[0] = 1

    def end(self, done: int, rows: int) -> None:
        """Acknowledged. Each number is within eight bytes that are aligned, and so stored at once."""
        self._map[16:24] = (self._number(16) + rows).to_bytes(8, "little")
        self._map[8:16] = done.to_bytes(8, "little")
        self._map[0] = 0

    def reset(self, done: int) -> None:
        self._map[:] = bytes(8) + done.to_bytes(8, "little") + bytes(8)

    @property
    def in_step(self) -> bool:
        return bool(self._map[0])

    @property
    def done(self) -> int:
        return self._number(8)

    @property
    def rows(self) -> int:
        return self._number(16)


def exit_code_of(work: Callable[[], object]) -> tuple[int, str]:
    """What a command that does `work` would end with, and the line it would print."""
    said = StringIO()
    with redirect_stderr(said):
        try:
            Command("step", callback=work).main([], standalone_mode=False)
            return 0, ""
        except SystemExit as error:
            return int(error.code or 0), said.getvalue().strip()


def do(job: Job) -> Outcome:
    """In the fork."""
    from crash import sabotage
    from crash.protocols import PROTOCOLS

    protocol = PROTOCOLS[job.protocol](Path(job.root), job.rows)
    sabotage.apply(job.sabotage)
    shim = ctypes.CDLL(None)
    if job.log:
        lie = job.sabotage == "no sync of any kind"
        shim.shim_start(job.root.encode(), job.log.encode(), int(protocol.without_exchange), int(lie))
        shim.shim_fail(ctypes.c_long(job.fail_at), job.fail_errno, int(job.fail_for_ever), int(job.fail_reads))
    elif protocol.without_exchange:
        sabotage.take_exchange_away()
    board = Board(Path(job.board)) if job.board else None
    done, code, message = job.first, 0, ""
    if job.recover:
        code, message = exit_code_of(protocol.recover)
    else:
        for n in range(job.first, job.last):
            if board:
                board.begin()
            code, message = exit_code_of(lambda n=n: protocol.step(n))
            if code:
                break
            done = n + 1
            if job.log:
                shim.shim_mark(ctypes.c_long(done))
            if board:
                board.end(done, protocol.rows_of(n))
    failed = ""
    if job.log:
        shim.shim_fail(ctypes.c_long(0), 0, 0, 0)
        shim.shim_failed.restype = ctypes.c_char_p
        failed = shim.shim_failed().decode()
    return Outcome(done, code, message, failed)


def serve() -> None:
    from crash import protocols, sabotage  # noqa: F401 - once, and not in every fork

    protocols._base_bundle()
    exit_code_of(lambda: None)
    gc.collect()
    gc.freeze()  # a fork's collector would copy every page
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        if job.protocol == "checkpoint":
            import siamese_train.checkpoint  # noqa: F401 - in seconds, once
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                os.write(writer, json.dumps(asdict(do(job))).encode())
                status = 0
            except BaseException:
                import traceback

                os.write(writer, json.dumps({"error": traceback.format_exc()}).encode())
            finally:
                os._exit(status)
        os.close(writer)
        answers.write(json.dumps({"pid": child}) + "\n")
        with os.fdopen(reader) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            answers.write(json.dumps({"signal": os.WTERMSIG(status)}) + "\n")
        else:
            answers.write((text or json.dumps({"error": f"status {status}"})) + "\n")


def ram_folder() -> Path | None:
    """A folder in memory, for what is written thousands of times and whose crashes are simulated anyway."""
    shared = Path("/dev/shm")  # noqa: S108
    return Path(tempfile.mkdtemp(prefix="siamese-crash-", dir=shared)) if os.access(shared, os.W_OK) else None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve()
