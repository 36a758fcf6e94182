"""What one process does that is timed and whose memory is measured; `scaling.py` starts one for each point."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np

PICTURES = 780
HEAD_OF_LIST = 256
"""So many outputs of each run have to be the same whatever its size."""


def images(bundle: Path, root: Path, number: int) -> dict[str, object]:
    """Embed `number` pictures, the folder gone over again where it has fewer; no cache."""
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.embedding import embed_images
    from siamese_deploy.image_folder import scan_image_folder

    verifier = OnnxVerifier(bundle, provider="cpu", throughput=True)
    folder = scan_image_folder(root)
    embed_images(verifier, folder, np.arange(2))
    ready = _ready()
    started_s = time.perf_counter()
    found = embed_images(verifier, folder, np.arange(number) % len(folder))
    seconds = time.perf_counter() - started_s
    assert len(found.vectors) == number
    assert not found.skipped
    assert np.array_equal(found.vectors[len(folder) :], found.vectors[: max(0, number - len(folder))])
    return ready | {"seconds": seconds, "outputs": _digest(found.vectors[:4])}


def pairs(bundle: Path, _: Path, number: int) -> dict[str, object]:
    """Score a list of `number` pairs of made-up embeddings and keep the scores, as an evaluation does."""
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.embedding import ImageEmbeddings, score_chunks
    from siamese_deploy.pairs import Pairs

    verifier = OnnxVerifier(bundle, provider="cpu")
    vectors = np.random.default_rng(0).standard_normal((PICTURES, verifier.embedding_dim), np.float32)
    embeddings = ImageEmbeddings(vectors, np.arange(PICTURES), ())
    verifier.score(vectors[:8], vectors[8:16])
    ready = _ready()
    left, right = np.empty(number, np.int64), np.empty(number, np.int64)
    is_same = np.zeros(number, np.bool_)
    for first in range(0, number, 2**16):
        k = np.arange(first, min(first + 2**16, number))
        left[k], right[k] = k * 617 % PICTURES, (k * 389 + k // PICTURES + 1) % PICTURES
    scores, done = np.empty(number, np.float32), 0
    started_s = time.perf_counter()
    for chunk, chunk_scores in score_chunks(verifier, embeddings, Pairs(left, right, is_same)):
        scores[done : done + len(chunk)] = chunk_scores
        done += len(chunk)
    seconds = time.perf_counter() - started_s
    assert done == number
    return ready | {"seconds": seconds, "outputs": _digest(scores[:HEAD_OF_LIST])}


def rows(bundle: Path, folder: Path, number: int) -> dict[str, object]:
    """Ask a gallery of `number` rows: the first question, which reads who is enrolled, and the median of three more."""
    from siamese_deploy import Gallery, OnnxVerifier

    verifier = OnnxVerifier(bundle, provider="cpu")
    query = question(verifier.embedding_dim)
    verifier.score(query[None], query[None])
    ready = _ready()
    gallery = Gallery(folder, verifier)
    times = []
    for _ in range(4):
        started_s = time.perf_counter()
        found = gallery._identification(query, 5, "max", None, 0.0, fast=False)
        times.append(time.perf_counter() - started_s)
    scores = gallery._score_rows(query)[1]
    assert len(scores) == number
    assert np.isfinite(scores).all()
    assert found.candidates[0].score == float(scores.max())
    return ready | {
        "first_s": times[0],
        "seconds": float(np.median(times[1:])),
        "outputs": _digest(scores[:HEAD_OF_LIST]),
    }


CHILDREN = {"images": images, "pairs": pairs, "rows": rows}


def run_child(what: str, bundle: str, folder: str, number: int) -> None:
    print(json.dumps(CHILDREN[what](Path(bundle), Path(folder), number) | {"peak_mib": peak_mib()}))


def question(dim: int) -> np.ndarray:
    return np.random.default_rng(99).standard_normal(dim, np.float32)


def _digest(outputs: np.ndarray) -> str:
    return hashlib.sha256(outputs.tobytes()).hexdigest()


def _ready() -> dict[str, object]:
    # The peak from here on: opening the graphs takes more than a short list does, and would hide what that adds.
    Path("/proc/self/clear_refs").write_text("5")
    return {"ready": time.monotonic()}  # one clock for all processes


def peak_mib() -> float:
    status = Path("/proc/self/status").read_text()  # unlike ru_maxrss, without what the parent had
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024
