"""Cost against size: pictures, their size, pairs, gallery rows, batch, threads, memory; and what 10^6 to 10^10 pictures
would take by these figures.

    python benchmarks/scaling.py                               measure: scaling.json, docs/scaling.png and tables
    python benchmarks/scaling.py measure --quick --out FOLDER  few sizes, to try it out
    python benchmarks/scaling.py tables                        the tables of scaling.json again
    python benchmarks/scaling.py picture                       docs/scaling.png of scaling.json again
    python benchmarks/scaling.py plan                          print what docs/scaling.md shows, from scaling.json
    python benchmarks/scaling.py plan --write docs/scaling.md  put it there; --check fails if it differs

An untrained resnet18 on drawn pictures, on the CPU. Every point is the median of at least three; for pictures, pairs
and rows each is a process of its own, so that its memory can be measured too. Outputs are compared over all sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from measuring import print_machine
from scaling_children import CHILDREN, HEAD_OF_LIST, PICTURES, question, run_child
from scaling_fit import Series, fitted_memory, fitted_time, print_series
from scaling_plan import blocks_of, differing, with_blocks

from siamese_deploy.embedding import SCORE_CHUNK_PAIRS
from siamese_deploy.gallery.store import CHUNK_ROWS

HERE = Path(__file__).parent
FIGURES = HERE / "scaling.json"
PICTURE = HERE.parent / "docs" / "scaling.png"
ROUNDS = 3
BIG_PICTURE = 1024
"""Side of the JPEG files that the plan reckons with."""
FULL_CHUNK = max(SCORE_CHUNK_PAIRS, CHUNK_ROWS)
SIZES: dict[str, tuple[int, ...]] = {
    "images_224": (8, 25, 78, 247, 780),
    "images_32": (78, 247, 780, 2_470, 7_800, 24_700),
    "pixels": (64, 128, 256, 512, 1024, 2048, 4096),
    "pairs": (300, 3_000, 30_000, 300_000, 3_000_000),
    "rows": (300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "head_batch": (1, 4, 16, 64, 256, 1024, 4096),
}
QUICK: dict[str, tuple[int, ...]] = {
    "images_224": (4, 8, 16),
    "images_32": (25, 78, 247),
    "pixels": (64, 256, 1024),
    "pairs": (300, 3_000, 30_000),
    "rows": (300, 1_000, 3_000),
    "batch": (1, 2, 4),
    "head_batch": (1, 16, 256),
}


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        context.invoke(measure)


@main.command()
@click.option("--quick", is_flag=True, help="Few and small sizes.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for scaling.json and scaling.png.")
def measure(quick: bool = False, out: Path | None = None) -> None:
    if quick and out is None:
        raise click.UsageError("--quick: name a folder with --out; its figures are not to be published")
    started_s = time.perf_counter()
    print_machine("onnxruntime", "numpy", "pillow", "torch")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/xdg"
        series, constants = measured(Path(folder), *((QUICK, 1) if quick else (SIZES, ROUNDS)))
    figures = {
        "measured": machine() | {"quick": quick},
        "constants": constants,
        "series": [one.to_json() for one in series],
    }
    path, picture = (FIGURES, PICTURE) if out is None else (out / FIGURES.name, out / PICTURE.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    for one in series:
        print_series(one)
    draw(path, picture)
    print(f"\nwritten: {path}, {picture}; {time.perf_counter() - started_s:.0f} s")


def figures_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--figures", type=click.Path(path_type=Path), default=FIGURES, show_default=True)(command)


@main.command()
@figures_option
def tables(figures: Path) -> None:
    for one in json.loads(figures.read_text())["series"]:
        print_series(Series.from_json(one))


@main.command()
@figures_option
@click.option("--out", type=click.Path(path_type=Path), default=PICTURE, show_default=True)
def picture(figures: Path, out: Path) -> None:
    draw(figures, out)


@main.command()
@figures_option
@click.option("--write", type=click.Path(path_type=Path), help="Replace the computed blocks of this page.")
@click.option("--check", type=click.Path(path_type=Path), help="Fail if this page shows anything else.")
def plan(figures: Path, write: Path | None, check: Path | None) -> None:
    blocks = blocks_of(json.loads(figures.read_text()))
    if write:
        write.write_text(with_blocks(write.read_text("utf-8"), blocks), "utf-8")
    elif check:
        wrong = differing(check.read_text("utf-8"), blocks)
        if wrong:
            raise click.ClickException(
                f"{check}: {', '.join(wrong)}: not what {figures.name} gives; run: scaling.py plan --write {check}"
            )
    else:
        for name, text in blocks.items():
            print(f"[{name}]\n\n{text}\n")


@main.command(hidden=True)
@click.argument("what", type=click.Choice(list(CHILDREN)))
@click.argument("bundle")
@click.argument("folder")
@click.argument("number", type=int)
def child(what: str, bundle: str, folder: str, number: int) -> None:
    run_child(what, bundle, folder, number)


def draw(figures: Path, out: Path) -> None:
    from scaling_chart import draw as drawn

    found = json.loads(figures.read_text())
    about = found["measured"]
    versions = f"ONNX Runtime {about['onnxruntime']}, {about['date']}"
    where = f"{about['cpu']}, {about['cores']} cores, {versions}{', TRIAL RUN' if about['quick'] else ''}"
    drawn([Series.from_json(one) for one in found["series"]], where, out)


def machine() -> dict[str, Any]:
    from siamese_deploy.bench.machine import describe_machine

    facts = describe_machine(None, with_gpu=False)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_1min": facts["load_1min"],
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "python": facts["versions"]["python"],
        **{name: metadata.version(name) for name in ("onnxruntime", "numpy", "pillow", "torch")},
    }


def measured(folder: Path, sizes: dict[str, tuple[int, ...]], rounds: int) -> tuple[list[Series], dict[str, float]]:
    from siamese_deploy.demo_data import write_demo_data

    write_demo_data(folder / "pictures", train_classes=1, val_classes=PICTURES // 12, drawings=12)
    pictures = folder / "pictures" / "val"
    big, small = (make_bundle(folder, side) for side in (224, 32))
    series, constants = in_this_process(folder, big, sizes)
    images, _ = in_children("images_224", "images", big, pictures, sizes, rounds)
    few, _ = in_children("images_32", "images", small, pictures, sizes, rounds)
    pairs, starts = in_children("pairs", "pairs", big, pictures, sizes, rounds)
    rows, row_bytes = gallery_rows(big, folder / "gallery", sizes, rounds)
    series += [images[0], *few, *pairs, *rows]
    fits = {one.name: one.fit for one in series}
    constants |= {
        "start_s": statistics.median(starts),
        "embed_ms_per_image": fits["images_224"].slope * 1e3,
        "embed_32px_ms_per_image": fits["images_32"].slope * 1e3,
        "us_per_pair": fits["pairs"].slope * 1e6,
        "us_per_row": fits["rows"].slope * 1e6,
        "first_us_per_row": fits["rows_first"].slope * 1e6,
        "row_bytes_disk": row_bytes,
    }
    for name in ("images", "pairs", "rows"):
        fit = fits[f"memory_{name}"]
        one = next(one for one in series if one.name == f"memory_{name}")
        span = one.sizes[-1] - one.sizes[0]
        growth = (one.costs[-1] - one.costs[0]) / span if fit is None else fit.slope
        constants[f"memory_bytes_per_{name.removesuffix('s')}"] = max(0.0, growth) * 2**20  # less is noise
    return series, constants


def make_bundle(folder: Path, side: int) -> Path:
    import torch

    from siamese_train.checkpoint import save_checkpoint
    from siamese_train.config import TrainConfig
    from siamese_train.model import SiameseNetwork

    torch.manual_seed(0)
    network = SiameseNetwork("resnet18", side)
    config = TrainConfig(folder, folder, folder, backbone="resnet18", image_size=side, weights="none")
    checkpoint, bundle = folder / f"{side}.pth", folder / f"bundle-{side}"
    optimizer = torch.optim.SGD(network.parameters())
    save_checkpoint(checkpoint, epoch=1, model=network, optimizer=optimizer, config=config, run={})
    export = Path(sys.executable).with_name("siamese-export")
    subprocess.run([str(export), "-c", str(checkpoint), "-o", str(bundle)], check=True, capture_output=True)
    return bundle


def in_children(
    name: str, what: str, bundle: Path, folder: Path, sizes: dict[str, tuple[int, ...]], rounds: int
) -> tuple[list[Series], list[float]]:
    """Time and memory against the number, and the start-up times."""
    results = {number: [child_of(what, bundle, folder, number) for _ in range(rounds)] for number in sizes[name]}
    assert len({one["outputs"] for found in results.values() for one in found}) == 1, name
    what_of = {"images_224": "pictures, 224 px", "images_32": "pictures, 32 px"}.get(name, what)
    times = {number: statistics.median(one["seconds"] for one in found) for number, found in results.items()}
    peaks = {number: statistics.median(one["peak_mib"] for one in found) for number, found in results.items()}
    title = {"images": "Embedding", "pairs": "Scoring"}[what]
    starts = [one["start_s"] for found in results.values() for one in found]
    return [
        time_series(name, f"{title}: {what_of}", what_of, times),
        memory_series(f"memory_{what}", f"Peak memory: {title.lower()}", what_of, peaks),
    ], starts


def child_of(what: str, bundle: Path, folder: Path, number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "child", what, str(bundle), str(folder), str(number)]
    asked = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"  {what} {number:,}: {found['seconds']:.3g} s, {found['peak_mib']:.0f} MiB", file=sys.stderr)
    return found | {"start_s": found["ready"] - asked}


def gallery_rows(
    bundle: Path, folder: Path, sizes: dict[str, tuple[int, ...]], rounds: int
) -> tuple[list[Series], float]:
    """Time and memory of identify, and bytes on the disk for each row."""
    from runtime import fill

    from siamese_deploy import Gallery, OnnxVerifier

    verifier = OnnxVerifier(bundle, provider="cpu")
    gallery = Gallery(folder, verifier, create=True)
    done, results, expected = 0, {}, ""
    for number in sizes["rows"]:
        while done < number:
            end = min(done + 10_000, number)
            vectors = fill(gallery, done, end)
            if done == 0:
                scores = verifier.score(question(vectors.shape[1])[None], vectors[:HEAD_OF_LIST])
                expected = hashlib.sha256(scores.tobytes()).hexdigest()
            done = end
        results[number] = [child_of("rows", bundle, folder, number) for _ in range(rounds)]
        assert {one["outputs"] for one in results[number]} == {expected}
    on_disk = sum(file.stat().st_size for file in folder.iterdir()) / done

    def median(what: str) -> dict[int, float]:
        return {number: statistics.median(one[what] for one in found) for number, found in results.items()}

    return [
        time_series("rows_first", "identify, first question of a process: rows", "rows", median("first_s")),
        time_series("rows", "identify, further questions: rows", "rows", median("seconds")),
        memory_series("memory_rows", "Peak memory: identify", "rows", median("peak_mib")),
    ], on_disk


def in_this_process(
    folder: Path, bundle: Path, sizes: dict[str, tuple[int, ...]]
) -> tuple[list[Series], dict[str, float]]:
    import scaling_parts as parts

    from siamese_deploy import OnnxVerifier

    verifier = OnnxVerifier(bundle, provider="cpu")
    decode, file_bytes = parts.decoding(folder, verifier.preprocess, sizes["pixels"])
    batch = parts.backbone_batches(verifier, sizes["batch"])
    head = parts.head_batches(verifier, sizes["head_batch"])
    backbone_threads, head_threads = parts.threads(bundle)
    cache_bytes, cache_us = parts.cache(folder / "cache", verifier.embedding_dim)
    series = [
        time_series("pixels", "Reading, decoding and resizing one JPEG on one core: pixels", "pixels", decode),
        time_series("batch", "Backbone, 224 px: pictures in a run", "pictures in a run", batch),
        time_series("head_batch", "Head: pairs in a run", "pairs in a run", head),
        Series("threads_backbone", "Backbone, 8 pictures: threads", "threads", "s", *columns(backbone_threads)),
        Series("threads_head", "Head, 8,192 pairs: threads", "threads", "s", *columns(head_threads)),
    ]
    return series, {
        "embedding_dim": verifier.embedding_dim,
        "backbone_ms_per_image": min(cost / size for size, cost in batch.items()) * 1e3,
        "one_image_ms": batch[1] * 1e3,
        "decode_ms_per_image": decode[BIG_PICTURE**2] * 1e3,
        "picture_bytes": file_bytes[BIG_PICTURE],
        "picture_side": BIG_PICTURE,
        "cache_bytes_per_image": cache_bytes,
        "cache_us_per_image": cache_us,
        "train_ms_per_image": parts.training_ms(),
    }


def columns(costs: dict[int, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(costs), tuple(costs.values())


def time_series(name: str, title: str, of: str, costs: dict[int, float]) -> Series:
    return Series(name, title, of, "s", *columns(costs), fitted_time(*columns(costs)))


def memory_series(name: str, title: str, of: str, peaks: dict[int, float]) -> Series:
    full = [number for number in peaks if number >= FULL_CHUNK]
    if of in ("pairs", "rows") and len(full) > 1:  # below a full chunk it is the chunk's buffer that grows
        peaks = {number: peaks[number] for number in full}
    return Series(name, title, of, "MiB", *columns(peaks), fitted_memory(*columns(peaks)))


if __name__ == "__main__":
    main()
