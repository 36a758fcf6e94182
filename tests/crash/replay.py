"""Every crash of a recorded run: rebuild what the disk may hold, reopen it with the real code, and judge."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from crash.disk import Disk, Image, Operation, digest, read_image, read_log, write_image
from crash.protocols import PROTOCOLS
from crash.worker import Job, Worker

_DRAWS_AGAIN = 1


@dataclass
class Report:
    """Counts of replays, and what went wrong."""

    points: int = 0
    """Moments at which the power could go."""
    crashes: int = 0
    """Points times variants."""
    reopened: int = 0
    """Of them, those that gave a folder and a promise like no other: reopened and judged."""
    recoveries: int = 0
    """Recoveries that were recorded and crashed as well; their crashes are counted above."""
    unreadable: int = 0
    """Embedding caches that had to be cleared, which is said and allowed."""
    violations: list[str] = field(default_factory=list)
    by_variant: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return (
            f"{self.points} points, {self.crashes} crashes, {self.reopened} different ones reopened, "
            f"{self.recoveries} recoveries crashed again, {self.unreadable} caches to clear, "
            f"{len(self.violations)} violations {dict(self.by_variant) or ''}"
        )


class Replay:
    """Args:
    draws: random crashes at each point, beside the named variants.
    every: look at one point of so many.
    recover_every: of the folders reopened, crash the recovery of one of so many; 0: of none.
    """

    def __init__(
        self, worker: Worker, scratch: Path, *, draws: int = 4, every: int = 1, recover_every: int = 0
    ) -> None:
        self.worker, self.scratch = worker, scratch
        self.draws, self.every, self.recover_every = draws, every, recover_every
        self.report = Report()

    def run(self, name: str, *, steps: int | None = None, rows: int = 3, sabotage: str = "") -> Report:
        """Record the protocol's steps from an empty folder on, and crash them."""
        root = self.scratch / "recorded"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        kind = PROTOCOLS[name]
        kind(root, rows).prepare()
        job = Job(name, str(root), 0, kind.steps if steps is None else steps, rows, sabotage=sabotage)
        disk = Disk(root)
        operations = self._record(job)
        self._crash(job, disk, operations, first=0, in_flight_at_end=False)
        # Nothing was written past the recorder, or this would differ.
        assert disk.now() == read_image(root)
        return self.report

    def _record(self, job: Job) -> list[Operation]:
        log = self.scratch / "log"
        outcome = self.worker.run(replace(job, log=str(log)))
        assert outcome.exit_code == 0, outcome
        return read_log(log)

    def _crash(
        self,
        job: Job,
        disk: Disk,
        operations: list[Operation],
        *,
        first: int,
        in_flight_at_end: bool,
        again: bool = False,
    ) -> None:
        done, seen = first, set[tuple[bytes, int, bool]]()
        for index in range(len(operations) + 1):
            if index:
                disk.apply(operations[index - 1])
                done = operations[index - 1].value if operations[index - 1].kind == "!" else done
            in_flight = in_flight_at_end or done < job.last
            last = index == len(operations)
            if index % self.every and not last:
                continue
            self.report.points += 1
            for variant, image in disk.crashes(_DRAWS_AGAIN if again else self.draws, seed=index):
                self.report.crashes += 1
                key = digest(image), done, in_flight
                if key in seen:
                    continue
                seen.add(key)
                where = f"{job.protocol}, {done} done, call {index} of {len(operations)}, {variant}"
                self._judge(job, image, done, in_flight, where, variant)
                if not again and self.recover_every and len(seen) % self.recover_every == 0:
                    self._crash_recovery(job, image, done, in_flight, where)

    def _judge(self, job: Job, image: Image, done: int, in_flight: bool, where: str, variant: str) -> None:
        root = self._folder(image)
        self.report.reopened += 1
        protocol = PROTOCOLS[job.protocol](root, job.rows)
        try:
            found = protocol.view(job.last + 1)
            self.report.unreadable += isinstance(found, str) and job.protocol == "embedding cache"
            if protocol.accepts(found, done, in_flight=in_flight, power_loss=True):
                return
            problem = f"found {found}, expected {protocol.expected(done)}"
        except Exception as error:  # whatever it is, the folder cannot be used
            problem = repr(error)
        self.report.by_variant[variant.split()[0] if variant.startswith("draw") else variant] += 1
        self.report.violations.append(f"{where}: {problem[:400]}")

    def _crash_recovery(self, job: Job, image: Image, done: int, in_flight: bool, where: str) -> None:
        root = self._folder(image)
        self.report.recoveries += 1
        recovery = replace(job, root=str(root), first=done, recover=True, sabotage="")
        disk = Disk(root)
        outcome = self.worker.run(replace(recovery, log=str(self.scratch / "log")))
        left = PROTOCOLS[job.protocol](root, job.rows).leftovers()
        if outcome.exit_code or left:
            self.report.violations.append(f"{where}, recovered: {outcome.message}, left {left}")
            self.report.by_variant["recovery"] += 1
            return
        operations = read_log(self.scratch / "log")
        self._crash(recovery, disk, operations, first=done, in_flight_at_end=in_flight, again=True)

    def _folder(self, image: Image) -> Path:
        root = self.scratch / "crashed"
        shutil.rmtree(root, ignore_errors=True)
        write_image(image, root)
        return root
