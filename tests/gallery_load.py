"""One of several processes that use the same names of one gallery at once, and the judge of what they saw.

    python gallery_load.py GALLERY BUNDLE WHO OPERATIONS LOG sound|unlocked|forgetful

Every operation is written to LOG as one JSON list: start and end (ns of the machine's monotonic clock), kind, name, and
what came of it. "unlocked" takes no lock before it writes, "forgetful" loses some of its commits: both are there to be
found.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.errors import InputDataError

NAMES = tuple(f"id{k}" for k in range(16))
# Of a hundred operations; the first three write.
_KINDS = ("enrol",) * 12 + ("replace",) * 6 + ("remove",) * 12 + ("identify",) * 60 + ("list",) * 10


class Operation(NamedTuple):
    start: int
    end: int
    kind: str
    name: str
    """Of whom it writes; "" of those that read."""
    outcome: Any
    """Written: the new picture's number, or None if refused. "identify": the names found. "list": number by name."""


def picture(number: int) -> npt.NDArray[np.uint8]:
    return np.random.RandomState(number).randint(0, 256, (24, 32, 3)).astype(np.uint8)


class _Unlocked(sqlite3.Connection):
    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "BEGIN IMMEDIATE" or (statement == "COMMIT" and not self.in_transaction):
            statement = "SELECT 1"
        if statement.startswith("SELECT max"):  # the next slot to write to: time for another to ask the same
            time.sleep(0.005)
        return super().execute(statement, *values)


class _Forgetful(sqlite3.Connection):
    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and random.random() < 0.2:  # noqa: S311
            statement = "ROLLBACK"
        return super().execute(statement, *values)


def client(folder: Path, bundle: str, who: int, operations: int) -> Iterator[Operation]:
    gallery = Gallery(folder, OnnxVerifier(bundle, provider="cpu", threads=1), create=True)
    chance = random.Random(who)  # noqa: S311
    for n in range(operations):
        kind, name = chance.choice(_KINDS), chance.choice(NAMES)
        number = who * 10_000_000 + n
        outcome: Any = number
        start = time.monotonic_ns()
        try:
            if kind in ("enrol", "replace"):
                done = gallery.enrol(name, [picture(number)], replace=kind == "replace", doubles=False)
                assert (done.pictures, done.skipped) == (1, [])
            elif kind == "remove":
                assert gallery.remove(name) == 1, "a name with several pictures"
            elif kind == "identify":
                found = gallery.identify(picture(number), top=len(NAMES), threshold=0)
                assert found.damaged == 0
                assert {candidate.pictures for candidate in found.candidates} <= {1}
                outcome = [candidate.name for candidate in found.candidates]
            else:
                rows = gallery.store.pictures()
                assert not any(row.damaged for row in rows)
                outcome = {row.name: row.sha256.hex() for row in rows}
                assert len(outcome) == len(rows), "a name with several pictures"
        except InputDataError:
            if kind not in ("enrol", "remove"):
                raise
            outcome = None
        yield Operation(start, time.monotonic_ns(), kind, "" if kind in ("identify", "list") else name, outcome)


def explain(history: list[Operation], name: str, sha256_of: dict[int, str], last: str | None) -> str:
    """Why no order of the operations gives what they saw of `name`, each at a moment between its start and its end;
    "" if there is one (the history is linearizable). `last` is the SHA-256 that is enrolled in the end.

    Wing and Gong, "Testing and verification of concurrent objects", JPDC 17 (1993), in the form that keeps all possible
    states while it walks along the time: Lowe, "Testing for linearizability", CCPE 29 (2017).
    """
    concerned = [operation for operation in history if operation.name in ("", name)]
    moments = sorted(
        [(operation.start, 0, k) for k, operation in enumerate(concerned)]
        + [(operation.end, 1, k) for k, operation in enumerate(concerned)]
    )

    def after(state: str | None, k: int) -> tuple[bool, str | None]:
        """Whether it can happen in this state (the SHA-256 enrolled), and the state that it leaves."""
        operation = concerned[k]
        if operation.kind == "identify":
            return (state is not None) == (name in operation.outcome), state
        if operation.kind == "list":
            return operation.outcome.get(name) == state, state
        if operation.outcome is None:  # enrol, since it was there; remove, since it was not
            return (state is not None) == (operation.kind == "enrol"), state
        if operation.kind == "remove":
            return state is not None, None
        return state is None or operation.kind == "replace", sha256_of[operation.outcome]

    pending: set[int] = set()
    # A state, and the pending operations that have happened already.
    possible: set[tuple[str | None, frozenset[int]]] = {(None, frozenset())}

    def settled(state: str | None, done: frozenset[int]) -> tuple[str | None, frozenset[int]]:
        """What changes nothing happens as soon as it can."""
        return state, done.union(k for k in pending - done if after(state, k) == (True, state))

    for _, is_end, k in moments:
        if not is_end:
            pending.add(k)
            possible = {settled(*one) for one in possible}
            continue
        reached, ahead = set(possible), [one for one in possible if k not in one[1]]
        while ahead:
            state, done = ahead.pop()
            for other in pending - done:
                legal, new_state = after(state, other)
                if legal and (one := settled(new_state, done | {other})) not in reached:
                    reached.add(one)
                    if k not in one[1]:
                        ahead.append(one)
        pending.discard(k)
        possible = {(state, done - {k}) for state, done in reached if k in done}
        if not possible:
            return f"{name}: no order explains {concerned[k]}"
    return "" if last in {state for state, _ in possible} else f"{name}: enrolled in the end {last}, seen otherwise"


if __name__ == "__main__":
    connect, how = sqlite3.connect, sys.argv[6]
    factory = {"sound": sqlite3.Connection, "unlocked": _Unlocked, "forgetful": _Forgetful}[how]
    sqlite3.connect = lambda *a, **k: connect(*a, factory=factory, **k)  # type: ignore[assignment]
    with open(sys.argv[5], "w") as log:
        for one in client(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
            log.write(json.dumps(one) + "\n")
