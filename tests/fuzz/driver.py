"""The one driver of all fuzz tests: it feeds a target made-up inputs in a child process, and says what went wrong.

A target answers each input with the name of an outcome; whatever it raises is a bug found. So is a child that dies of
a signal, an input that takes longer than it may, and memory above the limit. Every input follows from a seed and its
number alone, and those that once found a bug lie in corpus/<target>, compressed, and are met first in every run.

Several targets of one file can share a child, since some take seconds to start: "stores:Galleries+Caches". Inputs begin
with their target's name and a line break.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np

CORPUS = Path(__file__).parent / "corpus"
SCALE = "SIAMESE_FUZZ"
"""Environment variable: inputs for each of the slow tests."""
_LARGEST_KEPT = 100_000  # bytes; a larger find is named by its number
_MOST_FINDINGS = 10
# Processor time, and time by the clock for a child that sleeps; the machine may be busy with other things.
_HANG = {signal.ITIMER_PROF: 30, signal.ITIMER_REAL: 600}


def inputs(default: int) -> int:
    return int(os.environ.get(SCALE, default))


class Target:
    """What is fuzzed; made once in each child process."""

    memory_mib: ClassVar[int] = 512
    """Most that the child may ever hold (resident), all its libraries included."""
    seconds: ClassVar[float] = 2.0
    """Most processor time for one input."""

    def __init__(self, folder: Path) -> None:
        """`folder` is empty and the target's own."""

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        raise NotImplementedError

    def check(self, data: bytes) -> str:
        raise NotImplementedError

    def sabotage(self) -> None:
        """Take out, in this process, the guard whose absence the target must notice."""
        raise NotImplementedError


@dataclass
class Finding:
    number: int
    """-k: the k-th file of the corpus, counted from its end."""
    what: str
    data: bytes = field(repr=False)


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    worst_s: float = 0.0
    worst_number: int = 0
    different: int = 0
    """Inputs that no earlier one in the same child process was equal to."""
    peak_mib: float = 0.0
    seconds: float = 0.0

    def line(self) -> str:
        counts = ", ".join(f"{count:,} {name}" for name, count in self.outcomes.most_common(12))
        return (
            f"{sum(self.outcomes.values()):,} inputs, {self.different:,} different, in {self.seconds:.1f} s; worst "
            f"{self.worst_s:.3f} s (number {self.worst_number}), peak {self.peak_mib:.0f} MiB; {counts}"
        )

    def add(self, other: Report) -> None:
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.different += other.different
        self.peak_mib = max(self.peak_mib, other.peak_mib)
        if other.worst_s > self.worst_s:
            self.worst_s, self.worst_number = other.worst_s, other.worst_number


def fuzz(target: str, folder: Path, count: int, *, seed: int = 1, first: int = 0, broken: bool = False) -> Report:
    """Run `target` ("module:Class" or "module:Class+Class" in this folder) on its corpus and on `count` inputs.

    Args:
        folder: for the target's files.
        broken: the negative control: the target's own sabotage is done first, and nothing is added to the corpus.
    """
    report = Report()
    started = time.monotonic()
    at, end = first - len(_corpus(target)), first + count
    while at < end and len(report.findings) < _MOST_FINDINGS:
        work = folder / f"from{at}"
        work.mkdir()
        part, at = _run_child(target, work, seed, first, at, end, broken)
        report.add(part)
    report.seconds = time.monotonic() - started
    print(f"\n{target}, seed {seed}: {report.line()}")
    if not broken:
        _keep(report.findings)
    return report


def assert_clean(report: Report) -> None:
    assert not report.findings, "\n\n".join(f"input {f.number}: {f.what}" for f in report.findings)


def _corpus(target: str) -> list[bytes]:
    return [
        kind.encode() + b"\n" + zlib.decompress(file.read_bytes())
        for kind in target.partition(":")[2].split("+")
        for file in sorted((CORPUS / kind.lower()).glob("*"))
    ]


def _keep(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.number >= 0 and len(finding.data) <= _LARGEST_KEPT:
            kind, _, data = finding.data.partition(b"\n")
            folder = CORPUS / kind.decode().lower()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{zlib.crc32(data):08x}").write_bytes(zlib.compress(data, 9))


def _run_child(target: str, folder: Path, seed: int, first: int, at: int, end: int, broken: bool) -> tuple[Report, int]:
    """What one child found, and where the next goes on."""
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    arguments = [target, str(folder), str(seed), str(first), str(at), str(end), str(int(broken))]
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-m", "fuzz.driver", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    report = Report()
    if (folder / "report.json").exists():
        content = json.loads((folder / "report.json").read_text())
        report = Report(
            Counter(content["outcomes"]),
            [Finding(number, what, base64.b64decode(data)) for number, what, data in content["findings"]],
            content["worst_s"],
            content["worst_number"],
            content["different"],
            content["peak_mib"],
        )
        at = content["next"]
    if child.returncode > 0:
        raise RuntimeError(f"a mistake in the fuzz test itself: {child.stderr[-3000:]}")
    if child.returncode < 0:
        number, size = struct.unpack("<qq", (folder / "current").read_bytes()[:16])
        data = (folder / "current").read_bytes()[16 : 16 + size]
        what = signal.Signals(-child.returncode).name
        report.findings.append(Finding(number, f"the process died ({what})\n{child.stderr[-2000:]}", data))
        at = number + 1 + first if number < 0 else number + 1
    return report, at


def _numbered_inputs(
    targets: dict[str, Target], name: str, seed: int, first: int, at: int, end: int
) -> Iterator[tuple[int, bytes]]:
    corpus = _corpus(name)
    for place in range(at, first):
        yield place - first, corpus[place - first]
    for number in range(max(at, first), end):
        kind = list(targets)[number % len(targets)]
        made = targets[kind].make(np.random.RandomState([seed, number]), number // len(targets))
        yield number, kind.encode() + b"\n" + made


def _child(name: str, folder: Path, seed: int, first: int, at: int, end: int, broken: bool) -> None:
    module, _, kinds = name.partition(":")
    targets: dict[str, Target] = {}
    for kind in kinds.split("+"):
        (folder / "work" / kind).mkdir(parents=True)
        targets[kind] = getattr(import_module(f"fuzz.{module}"), kind)(folder / "work" / kind)
        if broken:
            targets[kind].sabotage()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    _limit_address_space(max(target.memory_mib for target in targets.values()))
    for end_of_time in (signal.SIGALRM, signal.SIGPROF):  # they end the process even inside a library
        signal.signal(end_of_time, signal.SIG_DFL)
    report, seen = Report(), set[int]()
    place = at
    current = os.open(folder / "current", os.O_RDWR | os.O_CREAT)
    try:
        for number, data in _numbered_inputs(targets, name, seed, first, at, end):
            os.pwrite(current, struct.pack("<qq", number, len(data)) + data, 0)
            _one(targets, number, data, report)
            seen.add(hash(data))
            report.different = len(seen)
            place += 1
            if len(report.findings) >= _MOST_FINDINGS:
                break
            if place % 64 == 0:
                _write_report(folder, report, place)
    finally:
        _write_report(folder, report, place)


def _one(targets: dict[str, Target], number: int, data: bytes, report: Report) -> None:
    kind, _, content = data.partition(b"\n")
    target = targets[kind.decode()]
    for timer, limit_s in _HANG.items():
        signal.setitimer(timer, limit_s)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak counts anew from here: making an input may take more than checking it
    started = time.process_time()
    try:
        outcome = target.check(content)
    except BaseException as error:  # Rust's panics are no Exception
        trace = "".join(traceback.format_exception(error)[-8:])
        report.findings.append(Finding(number, f"{type(error).__name__}: {str(error)[:500]}\n{trace[-3000:]}", data))
        outcome = f"UNCAUGHT {type(error).__name__}"
    seconds = time.process_time() - started
    for timer in _HANG:
        signal.setitimer(timer, 0)
    report.outcomes[f"{kind.decode()}: {outcome}"] += 1
    if seconds > report.worst_s:
        report.worst_s, report.worst_number = seconds, number
    if seconds > target.seconds:
        report.findings.append(Finding(number, f"took {seconds:.1f} s, at most {target.seconds} are allowed", data))
    peak = _status_mib("VmHWM")
    if peak > report.peak_mib:
        if report.peak_mib <= target.memory_mib < peak:
            report.findings.append(Finding(number, f"{peak:.0f} MiB, at most {target.memory_mib} are allowed", data))
        report.peak_mib = peak


def _limit_address_space(memory_mib: int) -> None:
    """Far above what is allowed, so that the machine survives what the target does not."""
    limit = int(_status_mib("VmSize") + 4 * memory_mib) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status_mib(field_name: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field_name):
                return int(line.split()[1]) / 1024
    raise KeyError(field_name)


def _write_report(folder: Path, report: Report, place: int) -> None:
    content = {
        "outcomes": report.outcomes,
        "findings": [(f.number, f.what, base64.b64encode(f.data).decode()) for f in report.findings],
        "worst_s": report.worst_s,
        "worst_number": report.worst_number,
        "different": report.different,
        "peak_mib": report.peak_mib,
        "next": place,
    }
    (folder / "report.new").write_text(json.dumps(content))
    (folder / "report.new").replace(folder / "report.json")


if __name__ == "__main__":
    _target, _folder, *_numbers = sys.argv[1:]
    _seed, _first, _at, _end, _broken = map(int, _numbers)
    # By its own name, so that targets and driver share one module.
    import_module("fuzz.driver")._child(_target, Path(_folder), _seed, _first, _at, _end, bool(_broken))
