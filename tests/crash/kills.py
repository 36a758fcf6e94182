"""Writers that are killed in the middle of what they do, again and again, and what they leave."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from crash.protocols import PROTOCOLS, Protocol
from crash.worker import Board, Job, Worker

_KILLS_IN_ONE_FOLDER = 20
_FOR_EVER = 10**9
_STEPS_BEFORE_A_KILL = 3
"""At most; drawn anew for every kill."""


class Lost(AssertionError):
    """Something acknowledged is gone, or something is half there."""


@dataclass
class Report:
    kills: int = 0
    in_step: int = 0
    """Of them, those that came while a step was under way."""
    steps: int = 0
    """Acknowledged."""
    rows: int = 0
    """Acknowledged, of galleries and caches."""
    finished: int = 0
    """Steps that were never acknowledged and had been done all the same."""

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.in_step} of them within a step, {self.steps} steps and {self.rows} rows "
            f"acknowledged and there, {self.finished} steps done without an acknowledgement"
        )


def kill_writers(worker: Worker, folder: Path, name: str, kills: int, *, rows: int, sabotage: str = "") -> Report:
    """After every kill the folder is opened by the real code, and the next writer goes on in it.

    Raises:
        Lost: something acknowledged is gone, or something is half there.
    """
    report, chance = Report(), random.Random(name)  # noqa: S311 - when to kill
    board = Board(folder / "board")
    step_s = _seconds_of_a_step(worker, folder / "timed", name, rows)
    while report.kills < kills:
        root = folder / "killed"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        protocol = PROTOCOLS[name](root, rows)
        protocol.prepare()
        done = 0
        for _ in range(min(_KILLS_IN_ONE_FOLDER, kills - report.kills)):
            board.reset(done)
            job = Job(name, str(root), done, _FOR_EVER, rows, sabotage=sabotage, board=str(folder / "board"))
            wait_s = chance.uniform(0, _STEPS_BEFORE_A_KILL * step_s)
            report.in_step += _kill_in_a_step(worker, job, board, wait_s)
            report.kills += 1
            acknowledged = board.done - done
            report.steps += acknowledged
            report.rows += board.rows
            done = board.done
            found = _judged(protocol, done)
            if found == protocol.expected(done + 1):
                report.finished += 1
                done += 1
        protocol.recover()
        if _judged(protocol, done) == protocol.expected(done + 1) or protocol.leftovers():
            raise Lost(f"{name}: recovered to {protocol.view(done + 2)}, left {protocol.leftovers()}")
    return report


def _kill_in_a_step(worker: Worker, job: Job, board: Board, seconds: float) -> bool:
    """Start the job, and kill it so long after its first step began; whether it was within a step."""
    child = worker.start(job)
    deadline = time.monotonic() + 60
    while not board.in_step and board.done == job.first and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    answer = worker.ended()
    if answer.get("signal") != signal.SIGKILL:
        raise Lost(f"{job.protocol}: the next writer cannot go on: {answer}")
    return board.in_step


def _judged(protocol: Protocol, done: int) -> object:
    try:
        found = protocol.view(done + 2)
    except Exception as error:  # whatever it is, the folder cannot be used
        raise Lost(f"{protocol.root}: {done} done: {error!r}") from error
    if not protocol.accepts(found, done, in_flight=True, power_loss=False):
        raise Lost(f"{protocol.root}: {done} done: found {found}")
    return found


def _seconds_of_a_step(worker: Worker, root: Path, name: str, rows: int) -> float:
    root.mkdir()
    protocol = PROTOCOLS[name](root, rows)
    protocol.prepare()
    worker.run(Job(name, str(root), 0, 1, rows))  # warm
    started = time.monotonic()
    assert worker.run(Job(name, str(root), 1, 4, rows)).done == 4
    shutil.rmtree(root)
    return (time.monotonic() - started) / 3
