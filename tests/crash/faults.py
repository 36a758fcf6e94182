"""Every call of a step fails once, and from then on: the answer is an error or the result, and never half of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from crash.disk import Disk, Image, read_image, read_log, write_image
from crash.protocols import PROTOCOLS
from crash.worker import SHORT_WRITE, Job, Outcome, Worker

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, SHORT_WRITE)


@dataclass
class Report:
    runs: int = 0
    """In which at least one call failed."""
    errors: int = 0
    """Of them, those that ended with an error; the others got their result in spite of it."""
    codes: Counter[int] = field(default_factory=Counter)
    """Exit codes of the errors."""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.runs} runs, {self.errors} errors {dict(self.codes)}, {len(self.violations)} violations"


class FaultLoop:
    """Args:
    every: of the calls of a step, let one of so many fail; another one for each error.
    steps: no more than so many.
    errors: numbers of errno.
    """

    def __init__(
        self, worker: Worker, scratch: Path, *, every: int = 1, steps: int = 100, errors: tuple[int, ...] = ERRORS
    ) -> None:
        self.worker, self.scratch = worker, scratch
        self.every, self.steps, self.errors = every, steps, errors
        self.report = Report()
        self._turn = 0

    def run(self, name: str, *, sabotage: str = "") -> Report:
        kind = PROTOCOLS[name]
        root = self.scratch / "whole"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        kind(root).prepare()
        for n in range(min(self.steps, kind.steps)):
            before = read_image(root)
            for number, for_ever in self._modes():
                self._fail_each_call(name, before, n, number, for_ever, sabotage)
            assert self.worker.run(Job(name, str(root), n, n + 1)).exit_code == 0
        return self.report

    def _modes(self) -> Iterator[tuple[int, bool]]:
        for number in self.errors:
            yield number, False
            yield number, True

    def _fail_each_call(self, name: str, before: Image, n: int, number: int, for_ever: bool, sabotage: str) -> None:
        """Until a run meets no fault any more."""
        call = 1 + self._turn % self.every - self.every
        self._turn += 1
        while True:
            call += self.every
            root = self.scratch / "faulty"
            shutil.rmtree(root, ignore_errors=True)
            write_image(before, root)
            disk = Disk(root)
            job = Job(
                name,
                str(root),
                n,
                n + 1,
                log=str(self.scratch / "log"),
                fail_at=call,
                fail_errno=number,
                fail_for_ever=for_ever,
                fail_reads=number == errno.EIO,
                sabotage=sabotage,
            )
            outcome = self.worker.run(job)
            if not outcome.failed:
                return
            what = "short write" if number == SHORT_WRITE else os.strerror(number)
            where = f"{name}, step {n}, call {call} ({outcome.failed[0]}): {what}{' from then on' if for_ever else ''}"
            self._judge(job, disk, outcome, where)

    def _judge(self, job: Job, disk: Disk, outcome: Outcome, where: str) -> None:
        self.report.runs += 1
        self.report.errors += outcome.exit_code != 0
        if outcome.exit_code:
            self.report.codes[outcome.exit_code] += 1
        root, n = Path(job.root), job.first
        protocol = PROTOCOLS[job.protocol](root)
        in_flight = outcome.exit_code != 0

        def complain(problem: object) -> None:
            self.report.violations.append(
                f"{where}: {str(problem)[:400]} (said: {outcome.exit_code} {outcome.message})"
            )

        # SQLite calls damaged what it cannot read. A gallery is read again, and so may be called damaged only where
        # that goes well; a cache is not, as all that it holds can be had again.
        read = outcome.failed.startswith("R")
        damaged = read and (job.protocol == "embedding cache" or not job.fail_for_ever)
        allowed = (0, 4, 5) if damaged and ("gallery" in job.protocol or "cache" in job.protocol) else (0, 5)
        if outcome.exit_code not in allowed or "\n" in outcome.message:
            complain("expected exit code 5 and one line")
        if outcome.exit_code and not job.fail_for_ever and job.protocol != "gallery":  # whose next writer tidies up
            # A folder moved aside is kept where it is not sure that the new one has reached the disk.
            left = [path for path in protocol.leftovers() if not path.endswith(".tmp.old")]
            if left:
                complain(f"left {left}")
        # What is acknowledged must be on the disk, also after a sync that failed.
        for operation in read_log(self.scratch / "log"):
            disk.apply(operation)
        crashed = self.scratch / "crashed"
        for variant, image in list(disk.crashes(0, 0))[:1]:
            shutil.rmtree(crashed, ignore_errors=True)
            write_image(image, crashed)
            try:
                there = PROTOCOLS[job.protocol](crashed)
                found = there.view(n + 2)
                if not there.accepts(found, outcome.done, in_flight=in_flight, power_loss=True):
                    complain(f"power lost, {variant}: found {found}")
            except Exception as error:
                complain(f"power lost, {variant}: {error!r}")
        try:
            found = protocol.view(n + 2)
            if not protocol.accepts(found, outcome.done, in_flight=in_flight, power_loss=False):
                return complain(f"found {found}")
        except Exception as error:
            return complain(repr(error))
        # The fault is over: the same step, and whoever tidies up.
        if found != protocol.expected(n + 1):
            again = self.worker.run(replace(job, log="", sabotage=""))
            if again.exit_code:
                complain(f"again: {again}")
        tidied = self.worker.run(replace(job, log="", sabotage="", recover=True))
        if tidied.exit_code or protocol.view(n + 2) != protocol.expected(n + 1) or protocol.leftovers():
            complain(f"afterwards: {tidied}, {protocol.view(n + 2)}, left {protocol.leftovers()}")
