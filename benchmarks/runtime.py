"""What the deploy runtime promises, measured: start-up, the cache, a gallery of 100,000 rows, runs at once on the CPU.

    python runtime.py            everything
    python runtime.py start      one of: start, cache, identify, memory, throughput

Each compares two ways in one run, in turns, by medians, and asserts that both give the same answers. An untrained
resnet18 of 224 px on drawn pictures: what is timed does not depend on what the network has learnt.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from siamese_deploy import Gallery

ROWS = 100_000
PICTURES = 780
DIM = 1000

BARE = """
import sys
import numpy, onnxruntime
backbone, head = (onnxruntime.InferenceSession(f"{sys.argv[1]}/{name}.onnx") for name in ("backbone", "head"))
images = numpy.zeros((2, 224, 224, 3), numpy.uint8)
embeddings = backbone.run(None, {"images": images})[0]
head.run(None, {"left": embeddings[:1], "right": embeddings[1:]})
"""


@click.command()
@click.argument("which", nargs=-1, type=click.Choice(["start", "cache", "identify", "memory", "throughput"]))
def main(which: tuple[str, ...]) -> None:
    versions = {name: metadata.version(name) for name in ("onnxruntime", "numpy", "pillow")}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()), time.strftime("%Y-%m-%d"))
    print("| what | ours | baseline | ratio | promised |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/xdg"
        bundle = make_bundle(Path(folder))
        pictures = Path(folder, "pictures/val")
        if not which or "start" in which:
            start(bundle, pictures)
        if not which or "cache" in which:
            cache(bundle, pictures, Path(folder))
        if not which or "throughput" in which:
            throughput(bundle, pictures)
        if not which or "identify" in which:
            identify(bundle, Path(folder, "gallery"))
        if not which or "memory" in which:
            memory(bundle, Path(folder))


def make_bundle(folder: Path) -> Path:
    import torch

    from siamese_deploy.demo_data import write_demo_data
    from siamese_train.checkpoint import save_checkpoint
    from siamese_train.config import TrainConfig
    from siamese_train.model import SiameseNetwork

    write_demo_data(folder / "pictures", train_classes=1, val_classes=PICTURES // 12, drawings=12)
    torch.manual_seed(0)
    network = SiameseNetwork("resnet18", 224)
    config = TrainConfig(folder, folder, folder, backbone="resnet18", image_size=224, weights="none")
    save_checkpoint(
        folder / "best.pth",
        epoch=1, model=network, optimizer=torch.optim.SGD(network.parameters()), config=config, run={},
    )  # fmt: skip
    export = Path(sys.executable).with_name("siamese-export")
    command = [str(export), "-c", str(folder / "best.pth"), "-o", str(folder / "bundle")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "bundle"


def start(bundle: Path, pictures: Path) -> None:
    """`siamese verify` on two pictures against a bare script; both with the files in the system's cache."""
    two = [str(path) for path in sorted(pictures.rglob("*.png"))[:2]]
    siamese = Path(sys.executable).with_name("siamese")
    ways = {
        "bare": [sys.executable, "-c", BARE, str(bundle)],
        "verify": [str(siamese), "verify", *two, "-c", str(bundle), "--provider", "cpu"],
        "verify, no cache": [str(siamese), "verify", *two, "-c", str(bundle), "--provider", "cpu", "--no_cache"],
    }
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    times = in_turns({name: lambda c=command: run(c, environment) for name, command in ways.items()}, rounds=15)  # type: ignore[misc]
    for name in ("verify", "verify, no cache"):
        row(f"start-up: siamese {name}, two pictures", times[name], times["bare"], "at most 2.0", most=2.0)


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 10), done.stderr


def cache(bundle: Path, pictures: Path, folder: Path) -> None:
    """The second evaluation of a folder against the first, start-up (the same on three pictures) taken off both."""
    few = folder / "few"
    for name, path in (("a/0.png", 0), ("a/1.png", 1), ("b/0.png", 12)):  # two of a class are the fewest it takes
        (few / name).parent.mkdir(parents=True, exist_ok=True)
        (few / name).write_bytes(sorted(pictures.rglob("*.png"))[path].read_bytes())
    siamese = Path(sys.executable).with_name("siamese-eval")

    def evaluate(where: Path, out: Path, kept: Path) -> float:
        command = [siamese, "-v", where, "-o", out, "-c", bundle, "--images", "none", "--provider", "cpu"]
        started_s = time.perf_counter()
        subprocess.run([*map(str, command), "--cache", str(kept)], check=True, capture_output=True)
        return time.perf_counter() - started_s

    firsts, seconds = [], []
    for k in range(3):
        kept = folder / f"cache{k}"
        evaluate(few, folder / "out-few", kept)
        idle_s = statistics.median(evaluate(few, folder / "out-few", kept) for _ in range(3))
        first_s = evaluate(pictures, folder / "out1", kept)
        second_s = statistics.median(evaluate(pictures, folder / "out2", kept) for _ in range(3))
        assert (folder / "out1/pairs.csv").read_bytes() == (folder / "out2/pairs.csv").read_bytes()
        first, second = (json.loads((folder / out / "metrics.json").read_text()) for out in ("out1", "out2"))
        assert first.pop("run") != second.pop("run")
        assert first == second
        firsts.append(first_s - idle_s)
        seconds.append(second_s - idle_s)
    slow, quick = statistics.median(firsts), statistics.median(seconds)
    n_pictures = len(list(pictures.rglob("*.png")))
    row(f"second siamese-eval of {n_pictures} pictures, against the first", quick, slow, "at most 0.1", most=0.1)


def throughput(bundle: Path, pictures: Path) -> None:
    """Single-threaded runs at once against one run on all cores."""
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.preprocess import load_image

    one, many = (OnnxVerifier(bundle, provider="cpu", throughput=way) for way in (False, True))
    images = np.stack([load_image(path, one.preprocess) for path in sorted(pictures.rglob("*.png"))[:32]])
    assert np.array_equal(one.embed(images), many.embed(images))
    times = in_turns({"one": lambda: one.embed(images), "many": lambda: many.embed(images)}, rounds=12)
    row("32 pictures: single-threaded runs at once, against one run on all cores", times["many"], times["one"], "")


def identify(bundle: Path, folder: Path) -> None:
    """1:100,000, against the bare head on the same matrix in memory."""
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.gallery.store import CHUNK_ROWS

    verifier = OnnxVerifier(bundle, provider="cpu")
    gallery = Gallery(folder, verifier, create=True)
    matrix = fill(gallery, 0, ROWS)
    query = matrix[12345]

    def bare() -> np.ndarray:
        run_head = verifier._head.run
        parts = [
            run_head(None, {"left": query[None], "right": matrix[k : k + CHUNK_ROWS]})[0]
            for k in range(0, ROWS, CHUNK_ROWS)
        ]
        return np.concatenate(parts)[:, 0]

    def ours() -> np.ndarray:
        found = gallery._identification(query, 5, "max", None, 0.0, fast=False)
        assert len(found.candidates) == 5
        return np.array([candidate.score for candidate in found.candidates])

    assert np.array_equal(np.sort(bare())[::-1][:5].astype(np.float64), ours())
    times = in_turns({"bare": bare, "ours": ours}, rounds=9)
    row(f"identify 1:{ROWS:,}, against the bare head", times["ours"], times["bare"], "at most 1.3", most=1.3)


def fill(gallery: Gallery, first: int, end: int) -> np.ndarray:
    """Enrol made-up rows; gives their vectors, (end - first, DIM) float32."""
    from siamese_deploy.gallery.records import Group, StoredPicture

    random = np.random.default_rng(first)
    parts = []
    for start_row in range(first, end, 5000):
        rows = range(start_row, min(start_row + 5000, end))
        parts.append(random.standard_normal((len(rows), DIM), np.float32))
        stored = [StoredPicture(f"id{k // 4}", f"{k}".encode().ljust(32), "") for k in rows]
        groups = [Group(stored[k].name, stored[k : k + 4], parts[-1][k : k + 4]) for k in range(0, len(stored), 4)]
        assert all(isinstance(outcome, list) for outcome in gallery.store.enrol(groups))
    return np.concatenate(parts)


MEMORY = """
import re, sys
import numpy as np
from siamese_deploy import Gallery, OnnxVerifier
verifier = OnnxVerifier(sys.argv[1], provider="cpu")
gallery = Gallery(sys.argv[2], verifier)
query = np.random.RandomState(0).standard_normal(1000).astype(np.float32)
found = gallery._identification(query, 5, "max", None, 0.0, fast=False)
status = open("/proc/self/status").read()  # unlike ru_maxrss, without what the parent had
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) // 1024)
"""


def memory(bundle: Path, folder: Path) -> None:
    """Peak memory of a process that identifies once, by the number of rows."""
    from siamese_deploy import OnnxVerifier

    gallery = Gallery(folder / "growing", OnnxVerifier(bundle, provider="cpu"), create=True)
    done = 0
    for rows in (10_000, 100_000, 200_000):
        for first in range(done, rows, 10_000):
            fill(gallery, first, first + 10_000)
        done = rows
        command = [sys.executable, "-c", MEMORY, str(bundle), str(folder / "growing")]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| peak memory of identify 1:{rows:,} ({rows * DIM * 4 // 2**20:,} MiB) | {peak} MiB | | | |", flush=True
        )


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started_s = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(values) for name, values in times.items()}


def row(what: str, ours_s: float, baseline_s: float, promised: str, most: float | None = None) -> None:
    ratio = ours_s / baseline_s
    print(f"| {what} | {ours_s * 1e3:,.0f} ms | {baseline_s * 1e3:,.0f} ms | {ratio:.2f} | {promised} |", flush=True)
    assert most is None or ratio <= most, (what, ratio)


if __name__ == "__main__":
    main()
