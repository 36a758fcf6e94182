"""A gallery under fire: writers that are killed, and many processes at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from siamese_deploy.gallery.store import GalleryStore

KILLS = int(os.environ.get("SIAMESE_KILLS", "300"))
OPERATIONS = int(os.environ.get("SIAMESE_OPERATIONS", "200"))

_WRITER = """
import sys
from pathlib import Path
import numpy as np
from siamese_deploy.gallery.store import GalleryStore, Group, StoredPicture
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


_CLIENT = """
import random, sys
from pathlib import Path
import numpy as np
from siamese_deploy import Gallery, OnnxVerifier
folder, bundle, who, operations = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
verifier = OnnxVerifier(bundle, provider="cpu", threads=1)
gallery = Gallery(folder, verifier, create=True)
chance = random.Random(who)
mine = {}  # name -> picture
def picture(number):
    return np.random.RandomState(who * 1_000_000 + number).randint(0, 256, (24, 32, 3)).astype(np.uint8)
for number in range(operations):
    what = chance.choice(("enrol", "remove", "identify", "identify"))
    if what == "enrol" or not mine:
        name = f"{who}-{number}"
        mine[name] = picture(number)
        assert gallery.enrol(name, [mine[name]], doubles=False).pictures == 1
    elif what == "remove" and len(mine) > 10:
        name = chance.choice(sorted(mine))
        assert gallery.remove(name) == 1
        del mine[name]
    else:
        name = chance.choice(sorted(mine))
        found = gallery.identify(mine[name], top=10_000)
        assert found.damaged == 0
        scores = {candidate.name: candidate.score for candidate in found.candidates}
        assert scores[name] == verifier.compare(mine[name], mine[name])
        assert {other for other in scores if other.startswith(f"{who}-")} == set(mine)
print(*mine)
"""


def _work_at_once(tmp_path: Path, bundle: Path, operations: int) -> None:
    command = [sys.executable, "-c", _CLIENT, str(tmp_path / "gallery"), str(bundle)]
    children = [
        subprocess.Popen(
            [*command, str(who), str(operations)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for who in range(8)
    ]
    expected: set[str] = set()
    for child in children:
        stdout, stderr = child.communicate()
        assert (child.returncode, stderr) == (0, "")
        expected |= set(stdout.split())
    store = GalleryStore(tmp_path / "gallery")
    with store.snapshot() as snapshot:
        assert snapshot.rows.damaged == 0
        assert sum(len(row) for row, _ in snapshot.sound_vectors()) == len(snapshot.rows.slots)
        assert set(snapshot.rows.names) == expected


def test_eight_processes_at_once(tmp_path: Path, tiny_bundle: Path) -> None:
    _work_at_once(tmp_path, tiny_bundle, 15)


@pytest.mark.slow
def test_eight_processes_at_once_for_long(tmp_path: Path, tiny_bundle: Path) -> None:
    _work_at_once(tmp_path, tiny_bundle, OPERATIONS)
