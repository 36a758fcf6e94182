"""A gallery under fire: writers that are killed, and many processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gallery_load
import numpy as np
import pytest
from gallery_load import NAMES, Operation, explain, picture

from siamese_deploy import OnnxVerifier
from siamese_deploy.gallery.store import GalleryStore

KILLS = int(os.environ.get("SIAMESE_KILLS", "300"))
PROCESSES = int(os.environ.get("SIAMESE_PROCESSES", "8"))
OPERATIONS = int(os.environ.get("SIAMESE_OPERATIONS", "200"))
"""Of each process."""

_WRITER = """
import sys
from pathlib import Path
import numpy as np
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.store import GalleryStore
store, first = GalleryStore.create(Path(sys.argv[1]), "digest", 32), int(sys.argv[2])
print("ready", flush=True)
for k in range(first, first + 100_000):
    rows = [StoredPicture(f"id{k}", f"{k} {n}".encode().ljust(32), "") for n in range(3)]
    assert store.enrol([Group(f"id{k}", rows, np.full((3, 32), k + 1, np.float32))]) == [[0, 1, 2]]
    print("enrolled", k, flush=True)
    if k % 5 == 4 and k > first:
        store.remove([f"id{k - 1}"])
        print("removed", k - 1, flush=True)
"""


def _kill_writers(folder: Path, kills: int) -> None:
    """Enrol until killed, again and again: what was acknowledged is there, and nothing is half there."""
    acknowledged: dict[int, bool] = {}  # whether it has to be there
    maybe: set[int] = set()  # under way when the kill came
    chance = random.Random(0)  # noqa: S311 - when to kill
    first = 0
    for _ in range(kills):
        command = [sys.executable, "-c", _WRITER, str(folder), str(first)]
        # Unbuffered: `communicate` does not see what `readline` has read ahead.
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        lines = [child.stdout.readline() for _ in range(chance.randint(0, 4))]
        time.sleep(chance.random() * 0.01)  # less than an enrolment takes
        child.send_signal(signal.SIGKILL)
        stdout, stderr = child.communicate()
        stdout = b"".join(lines) + stdout
        assert stderr == b""
        last = first - 1
        for line in stdout.decode().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            what, k = line.split()
            acknowledged[int(k)] = what == "enrolled"
            last = max(last, int(k))
        maybe |= {last + 1} | ({last - 1} if last % 5 == 4 and acknowledged.get(last - 1) else set())
        first = last + 2
    found: dict[int, int] = {}
    store = GalleryStore(folder)
    with store.snapshot() as snapshot:
        assert snapshot.rows.damaged == 0
        for row, vectors in snapshot.sound_vectors():
            for index, vector in zip(row, vectors, strict=True):
                k = int(snapshot.rows.names[snapshot.rows.identities[index]].removeprefix("id"))
                assert (vector == k + 1).all()
                found[k] = found.get(k, 0) + 1
        assert sum(found.values()) == len(snapshot.rows.slots)  # no row without its vector
    assert set(found.values()) <= {3}
    for k, there in acknowledged.items():
        assert (k in found) == there or k in maybe, k
    assert set(found) <= set(acknowledged) | maybe
    assert len(acknowledged) > kills / 2, "killed before anything was enrolled"
    store.remove([snapshot.rows.names[0]])  # the next writer, whoever it is, wipes what the killed ones left
    used = {picture.slot for picture in store.pictures()}
    (file,) = folder.glob("vectors-*.f32")
    vectors = np.fromfile(file, np.float32).reshape(-1, 32)
    assert {slot for slot in range(len(vectors)) if vectors[slot].any()} == used


def test_a_killed_enrolment_leaves_what_it_acknowledged(tmp_path: Path) -> None:
    _kill_writers(tmp_path / "gallery", 5)


@pytest.mark.slow
def test_many_killed_enrolments(tmp_path: Path) -> None:
    _kill_writers(tmp_path / "gallery", KILLS)


_LOAD = Path(gallery_load.__file__)


def _work_at_once(folder: Path, bundle: Path, processes: int, operations: int, how: str = "sound") -> None:
    """All of them on the same names; then a check that what they saw has an order, and what they left is sound."""
    logs = [folder / f"{who}.jsonl" for who in range(processes)]
    children = []
    for who, log in enumerate(logs):
        arguments = [folder / "gallery", bundle, who, operations, log, how]
        command = [sys.executable, str(_LOAD), *map(str, arguments)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [child.communicate() for child in children]
    if how != "forgetful":  # who forgets says nothing
        assert [child.returncode for child in children] == [0] * processes, outputs
    history = [Operation(*json.loads(line)) for log in logs for line in log.read_text().splitlines()]
    wrote = [one for one in history if one.name]
    if how == "sound":
        assert len(history) == processes * operations
    numbers = {one.outcome: _sha256(one.outcome) for one in wrote if one.outcome is not None and one.kind != "remove"}
    store = GalleryStore(folder / "gallery")
    last = {row.name: row.sha256.hex() for row in store.pictures()}
    assert len(last) == len(store.pictures())
    for name in NAMES:
        assert explain(history, name, numbers, last.get(name)) == ""
    verifier = OnnxVerifier(bundle, provider="cpu", threads=1)
    number_of = {sha256: number for number, sha256 in numbers.items()}
    with store.snapshot() as snapshot:
        assert snapshot.rows.damaged == 0
        found = 0
        for row, vectors in snapshot.sound_vectors():
            for index, vector in zip(row, vectors, strict=True):
                name = snapshot.rows.names[snapshot.rows.identities[index]]
                (expected,) = verifier.embed(picture(number_of[last[name]])[None])
                assert vector.tobytes() == expected.tobytes()
                found += 1
        assert found == len(last)


def _sha256(number: int) -> str:
    """As the gallery computes it of an array."""
    pixels = picture(number)
    return hashlib.sha256(b"RGB %d %d " % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()).hexdigest()


def test_several_processes_at_once(tmp_path: Path, tiny_bundle: Path) -> None:
    _work_at_once(tmp_path, tiny_bundle, 4, 40)


@pytest.mark.slow
def test_many_processes_at_once(tmp_path: Path, tiny_bundle: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("SIAMESE_GALLERY_FOLDER", tmp_path)))
    try:
        _work_at_once(folder, tiny_bundle, PROCESSES, OPERATIONS)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [("unlocked", None), ("forgetful", "no order explains|in the end")])
def test_a_lost_update_is_found(tmp_path: Path, tiny_bundle: Path, how: str, words: str | None) -> None:
    with pytest.raises(AssertionError, match=words):
        for attempt in range(10):  # a race is lost sooner or later
            (tmp_path / str(attempt)).mkdir()
            _work_at_once(tmp_path / str(attempt), tiny_bundle, 4, 60, how)


def _history(*operations: tuple[object, ...]) -> list[Operation]:
    return [Operation(*operation) for operation in operations]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "last", "words"),
    [
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "identify", "", ["id0"])), "one", ""),
        (_history((0, 5, "enrol", "id0", 1), (1, 2, "identify", "", []), (3, 4, "identify", "", ["id0"])), "one", ""),
        (_history((0, 5, "enrol", "id0", 1), (1, 2, "identify", "", ["id0"]), (3, 4, "identify", "", [])), "one", "no"),
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "identify", "", [])), "one", "no order"),
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "enrol", "id0", 2)), "two", "no order"),
        (_history((0, 3, "enrol", "id0", 1), (1, 2, "enrol", "id0", None)), "one", ""),
        (_history((0, 1, "enrol", "id0", None)), None, "no order"),
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "replace", "id0", 2)), "two", ""),
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "replace", "id0", 2)), "one", "in the end"),
        (_history((0, 1, "enrol", "id0", 1), (2, 3, "list", "", {"id0": "two"})), "one", "no order"),
        (_history((0, 1, "enrol", "id0", 1), (2, 5, "remove", "id0", 0), (3, 4, "remove", "id0", 0)), None, "no order"),
        (_history((0, 1, "enrol", "id0", 1), (2, 5, "remove", "id0", 0), (3, 4, "remove", "id0", None)), None, ""),
    ],
)
def test_the_judge_of_histories(history: list[Operation], last: str | None, words: str) -> None:
    verdict = explain(history, "id0", {1: "one", 2: "two"}, last)
    assert words in verdict
    assert (verdict == "") == (words == "")
