"""A protocol on a disk that fills up: `python -m crash.full_disk PROTOCOL FOLDER`, FOLDER being a small disk's root.

Prints a line of JSON: how often the disk was full, the exit codes, acknowledged rows, and what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crash.protocols import PROTOCOLS
from crash.worker import exit_code_of

_SPARE_KIB = (0, 4, 8, 12, 20, 32, 48, 80)
_MOST_STEPS = 40


def fill(name: str, disk: Path) -> dict[str, object]:
    protocol, ballast = PROTOCOLS[name](disk, rows=40), disk / "ballast"
    protocol.prepare()
    done, full, codes, rows, problems = 0, 0, set[int](), 0, list[str]()
    for spare_kib in _SPARE_KIB:
        _leave_free(ballast, spare_kib * 1024)
        code, message = 0, ""
        for _ in range(_MOST_STEPS):
            code, message = exit_code_of(lambda: protocol.step(done))  # noqa: B023 - called at once
            if code:
                break
            rows += protocol.rows_of(done)
            done += 1
        full += code != 0
        codes |= {code} - {0}
        ballast.unlink(missing_ok=True)
        found = protocol.view(done + 2)
        if not protocol.accepts(found, done, in_flight=code != 0, power_loss=False) or "\n" in message:
            problems.append(f"{spare_kib} KiB, {done} done: {message!r}, found {found}")
        if found == protocol.expected(done + 1):
            done += 1
        else:
            protocol.step(done)  # there is room again
            rows, done = rows + protocol.rows_of(done), done + 1
        protocol.recover()
        if protocol.view(done + 2) != protocol.expected(done) or protocol.leftovers():
            problems.append(f"{spare_kib} KiB, afterwards: left {protocol.leftovers()}")
    return {"full": full, "codes": sorted(codes), "steps": done, "rows": rows, "problems": problems}


def _leave_free(ballast: Path, size: int) -> None:
    with open(ballast, "wb") as file:
        status = os.statvfs(ballast)
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - size))


if __name__ == "__main__":
    print(json.dumps(fill(sys.argv[1], Path(sys.argv[2]))))
