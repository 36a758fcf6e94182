"""Parts of the path, each timed in one process against its size; `scaling.py` makes series of them."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from measuring import in_turns, medians
from PIL import Image

from siamese_deploy import OnnxVerifier
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.preprocess import Preprocess, load_image
from siamese_deploy.providers import usable_cores

ROUNDS = 5
"""After one that is not counted."""
CACHED = 4096
TRAIN_BATCH = 32


def decoding(folder: Path, preprocess: Preprocess, sides: Sequence[int]) -> tuple[dict[int, float], dict[int, int]]:
    """Pixels -> seconds of one picture on one core, and side -> bytes of its file: the same made-up scene, as a JPEG of
    quality 90 with the grain of a photograph.
    """
    random = np.random.default_rng(0)
    scene = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
    paths, means = {}, []
    for side in sides:
        smooth = np.asarray(scene.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        pixels = (smooth + random.standard_normal((side, side, 1), np.float32) * 4).clip(0, 255).astype(np.uint8)
        paths[side] = folder / f"{side}.jpg"
        Image.fromarray(pixels).save(paths[side], quality=90)
        means.append(load_image(paths[side], preprocess).mean())
    assert max(means) - min(means) < 2, means
    times = timed({side: lambda path=path: load_image(path, preprocess) for side, path in paths.items()})  # type: ignore[misc]
    return {side**2: times[side] for side in sides}, {side: path.stat().st_size for side, path in paths.items()}


def backbone_batches(verifier: OnnxVerifier, sizes: Sequence[int]) -> dict[int, float]:
    height, width = verifier.preprocess.size_hw
    images = np.random.default_rng(0).integers(0, 256, (max(sizes), height, width, 3), np.uint8)
    first = [verifier.embed(images[:size])[0] for size in sizes]
    assert all(np.array_equal(one, first[0]) for one in first)
    return timed({size: lambda n=size: verifier.embed(images[:n]) for size in sizes})  # type: ignore[misc]


def head_batches(verifier: OnnxVerifier, sizes: Sequence[int]) -> dict[int, float]:
    left, right = made_up(verifier.embedding_dim, max(sizes))
    whole = verifier.score(left, right)
    assert all(np.array_equal(verifier.score(left[:size], right[:size]), whole[:size]) for size in sizes)

    def run(size: int) -> None:
        for _ in range(max(1, 64 // size)):  # one of a few microseconds is too short for the clock
            verifier.score(left[:size], right[:size])

    times = timed({size: lambda n=size: run(n) for size in sizes})  # type: ignore[misc]
    return {size: cost / max(1, 64 // size) for size, cost in times.items()}


def threads(bundle: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of the backbone on 8 pictures and of the head on 8,192 pairs, by threads: up to twice the cores."""
    numbers = [2**k for k in range(12) if 2**k <= 2 * usable_cores()]
    verifiers = {number: OnnxVerifier(bundle, provider="cpu", threads=number) for number in numbers}
    height, width = verifiers[1].preprocess.size_hw
    images = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), np.uint8)
    left, right = made_up(verifiers[1].embedding_dim, 8192)
    expected = verifiers[1].embed(images), verifiers[1].score(left, right)
    for verifier in verifiers.values():
        assert np.array_equal(verifier.embed(images), expected[0])
        assert np.array_equal(verifier.score(left, right), expected[1])
    return (
        timed({n: lambda v=verifier: v.embed(images) for n, verifier in verifiers.items()}),  # type: ignore[misc]
        timed({n: lambda v=verifier: v.score(left, right) for n, verifier in verifiers.items()}),  # type: ignore[misc]
    )


def cache(folder: Path, dim: int) -> tuple[float, float]:
    """Bytes on the disk and microseconds of a look-up, for each embedding."""
    store = EmbeddingCache(folder, max_bytes=2**30)
    keys = [hashlib.sha256(b"%d" % k).digest() for k in range(CACHED)]
    vectors = made_up(dim, CACHED)[0]
    store.put_many(keys, vectors)
    times = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        for first in range(0, CACHED, 32):
            found = store.get_many(keys[first : first + 32], dim)
            assert all(np.array_equal(found[keys[k]], vectors[k]) for k in (first, first + 31))
        times.append(time.perf_counter() - started_s)
    return store.path.stat().st_size / CACHED, statistics.median(times) / CACHED * 1e6


def training_ms() -> float:
    """Of one picture of a training step on all cores: the backbone forward and backward, and the optimiser, in float32;
    neither loading nor head.
    """
    import torch

    from siamese_train.model import SiameseNetwork

    torch.manual_seed(0)
    backbone = SiameseNetwork("resnet18", 224).backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-4)
    images = torch.rand(TRAIN_BATCH, 3, 224, 224)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = backbone(images).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    times = medians(in_turns({"step": step}, 3))
    assert losses[-1] < losses[0], losses
    return times["step"] / TRAIN_BATCH * 1e3


def made_up(dim: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.standard_normal((number, dim), np.float32), random.standard_normal((number, dim), np.float32)


def timed(ways: dict[int, Callable[[], object]]) -> dict[int, float]:
    return {int(name): cost for name, cost in medians(in_turns({str(k): f for k, f in ways.items()}, ROUNDS)).items()}
