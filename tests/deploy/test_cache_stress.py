"""Many processes on one embedding cache, some of them killed: every answer is the one without a cache, to the bit."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from siamese_deploy import OnnxVerifier
from siamese_deploy.cache_file import FILE_NAME, select
from siamese_deploy.embedding import embed_pictures

PROCESSES = int(os.environ.get("SIAMESE_PROCESSES", "8"))
OPERATIONS = int(os.environ.get("SIAMESE_OPERATIONS", "200"))
"""Of each process."""
DIM = 16

_CLIENT = """
import random, sys
from pathlib import Path
import numpy as np
from siamese_deploy import OnnxVerifier, embedding
from siamese_deploy.embedding_cache import EmbeddingCache
folder, bundle, who, operations, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
verifier = OnnxVerifier(bundle, provider="cpu", threads=1)
cache = EmbeddingCache(folder / "cache")
expected = np.load(folder / "expected.npy")
pictures = sorted((folder / "pictures").rglob("*.png"))
if how == "mixed up":  # two pictures under one key
    key = embedding.embedding_key
    embedding.embedding_key = lambda sha256, **more: key(sha256[:1] and b"0" * 32, **more)
chance = random.Random(who)
print("ready", flush=True)
for _ in range(operations):
    k = chance.randrange(len(pictures))
    ((item,),) = embedding.embed_pictures(verifier, [pictures[k]], cache=cache)
    assert item.vector.tobytes() == expected[k].tobytes(), pictures[k]
assert (cache.damaged, cache.warning) == (0, "")
print(cache.hits, cache.misses)
"""


def _work_at_once(
    folder: Path, bundle: Path, processes: int, operations: int, kills: int = 0, how: str = "sound"
) -> None:
    verifier = OnnxVerifier(bundle, provider="cpu", threads=1)
    pictures = sorted((folder / "pictures").rglob("*.png"))
    np.save(folder / "expected.npy", [next(embed_pictures(verifier, [path]))[0].vector for path in pictures])
    command = [sys.executable, "-c", _CLIENT, str(folder), str(bundle)]

    def start(who: int, operations: int) -> subprocess.Popen[str]:
        arguments = [*command, str(who), str(operations), how]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    children = [start(who, operations) for who in range(processes)]
    chance = random.Random(0)  # noqa: S311 - when to kill
    for n in range(kills):
        victim = start(1000 + n, 1_000_000)
        assert victim.stdout
        assert victim.stdout.readline() == "ready\n"
        time.sleep(chance.random() * 0.1)
        victim.send_signal(signal.SIGKILL)
        assert victim.communicate()[1] == ""
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * processes, outputs
    hits = sum(int(stdout.split()[1]) for stdout, _ in outputs)
    assert 0 < hits < processes * operations
    with closing(sqlite3.connect(folder / "cache" / FILE_NAME)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        keys = [key for (key,) in database.execute("SELECT key FROM embeddings")]
        assert keys
        assert all(row.is_sound(4 * DIM) for row in select(database, keys))


def test_several_processes_share_a_cache(tmp_path: Path, pictures: Path, tiny_bundle: Path) -> None:
    _work_at_once(tmp_path, tiny_bundle, 2, 40, kills=1)


@pytest.mark.slow
def test_many_processes_share_a_cache(tmp_path: Path, pictures: Path, tiny_bundle: Path) -> None:
    _work_at_once(tmp_path, tiny_bundle, PROCESSES, OPERATIONS, kills=PROCESSES)


@pytest.mark.slow
def test_two_pictures_under_one_key_are_found(tmp_path: Path, pictures: Path, tiny_bundle: Path) -> None:
    with pytest.raises(AssertionError):
        _work_at_once(tmp_path, tiny_bundle, 2, 20, how="mixed up")
