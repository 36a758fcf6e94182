"""Whole commands, from the shell's point of view.

    python whole.py pictures [--checkpoint FILE]    siamese-eval with all pair pictures, against the scripts' way
    python whole.py none                            siamese-eval --images none, against the bare backbone
    python whole.py help                            siamese-eval --help, against importing click
    python whole.py memory                          peak memory of evaluating 10,000 pictures

The first two: resnet18 at 224 px on Omniglot's 780 validation pictures, in turns, medians. Without --checkpoint the
network is untrained: times are the same, but accuracy means nothing, so int8 is exported with the limits open.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import Ratio, in_turns, medians, print_machine, print_ratios, print_table, require_kept
from training import omniglot

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
BATCHES = (1, 2, 4, 8, 16, 32)
BARE_PICTURES = 32
MANY = 10_000
MOST_DIFFERENCE = {"fp32": 1e-4, "int8": 0.2}
"""Of a score to the reference style's, by precision."""
OPEN_LIMITS = ["--max_auc_drop", "1", "--max_tar_drop", "1", "--max_far_growth", "1e9"]

Command = list[Any]


@click.group()
def main() -> None:
    print_machine("onnxruntime", "numpy", "pillow", "torch", "matplotlib")


@main.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def pictures(checkpoint: Path | None, rounds: int) -> None:
    """Promised: at least 8 times faster in float32 and 16 times in int8, with the same pairs and scores.

    The floor is the backbone alone over all pictures: no evaluation in float32 on this processor can be faster.
    """
    val = omniglot() / "val"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limits = OPEN_LIMITS if checkpoint is None else []
        checkpoint = checkpoint or untrained(folder)
        calibration = ["--calibration", omniglot() / "train", "--val_path", val]
        bundles = {
            "fp32": export(checkpoint, folder / "fp32"),
            "int8": export(checkpoint, folder / "int8", "--precision", "int8", *calibration, *limits),
        }
        style = [sys.executable, HERE / "reference_style.py", "-v", val, "-o", folder / "style", "-c", checkpoint]
        commands = {"reference style": style} | {
            way: evaluation(bundle, val, folder / f"{way}-out", "--images", "all") for way, bundle in bundles.items()
        }
        bare, n_pictures = bare_backbone(bundles["fp32"], val)
        found = medians(in_turns(running(commands) | bare, rounds))
        expected = np.loadtxt(folder / "style/scores.csv")
        differences = {way: compared(folder / f"{way}-out", expected, most) for way, most in MOST_DIFFERENCE.items()}
    floor_s, batch = of_all_pictures(found, n_pictures)
    slow = found["reference style"]
    rows = [(f"reference style, {len(expected)} pairs", f"{slow:.1f}", "")]
    rows += [(f"siamese-eval, {way}", f"{found[way]:.2f}", f"{differences[way]:.1e}") for way in bundles]
    rows.append((f"floor: backbone alone in float32, {n_pictures} pictures, batch {batch}", f"{floor_s:.2f}", ""))
    print_table("Whole evaluation with pair pictures", ("what", "seconds", "largest difference of a score"), rows)
    ratios = [
        Ratio("reference style / siamese-eval, fp32", slow / found["fp32"], 8),
        Ratio("reference style / siamese-eval, int8", slow / found["int8"], 16),
        Ratio("reference style / floor in float32", slow / floor_s),
        Ratio("siamese-eval, fp32 / floor in float32", found["fp32"] / floor_s),
    ]
    print_ratios("Whole evaluation with pair pictures: time of the first over that of the second", ratios)
    require_kept(ratios)


@main.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def none(rounds: int) -> None:
    """Promised: at most 1.15 times the bare backbone over all pictures, plus start-up."""
    val = omniglot() / "val"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = export(untrained(folder), folder / "bundle")
        few = folder / "few"
        for class_folder in sorted(val.iterdir())[:2]:
            (few / class_folder.name).mkdir(parents=True)
            for picture in sorted(class_folder.iterdir())[:2]:
                (few / class_folder.name / picture.name).write_bytes(picture.read_bytes())
        bare, n_pictures = bare_backbone(bundle, val)
        commands = {
            way: evaluation(bundle, pictures, folder / f"{way}-out", "--images", "none")
            for way, pictures in (("start", few), ("whole", val))
        }
        found = medians(in_turns(running(commands) | bare, rounds))
    bare_s, batch = of_all_pictures(found, n_pictures)
    net_s = found["whole"] - found["start"]
    rows = [
        (f"bare backbone, {n_pictures} pictures, batch {batch}", f"{bare_s:.2f}"),
        ("start-up (siamese-eval of four pictures)", f"{found['start']:.2f}"),
        ("siamese-eval --images none, start-up taken off", f"{net_s:.2f}"),
    ]
    print_table("Evaluation without pair pictures", ("what", "seconds"), rows)
    ratios = [Ratio("siamese-eval --images none without start-up / bare backbone", net_s / bare_s, at_most=1.15)]
    print_ratios("Evaluation without pair pictures: time of the first over that of the second", ratios)
    require_kept(ratios)


def bare_backbone(bundle: Path, pictures: Path) -> tuple[dict[str, Callable[[], object]], int]:
    """The backbone's graph on BARE_PICTURES pictures in memory, in batches of each of BATCHES; and how many pictures
    the folder has.
    """
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.image_folder import scan_image_folder
    from siamese_deploy.preprocess import load_image

    verifier = OnnxVerifier(bundle, provider="cpu")
    folder = scan_image_folder(pictures)
    images = np.stack([load_image(folder.absolute_path(k), verifier.preprocess) for k in range(BARE_PICTURES)])

    def over_all(batch: int) -> Callable[[], object]:
        starts = range(0, len(images), batch)
        return lambda: [verifier._backbone.run(None, {"images": images[k : k + batch]}) for k in starts]

    return {f"batch {batch}": over_all(batch) for batch in BATCHES}, len(folder)


def of_all_pictures(found: dict[str, float], n_pictures: int) -> tuple[float, int]:
    """Seconds of the bare backbone for so many pictures at its best batch, and that batch."""
    best = min(BATCHES, key=lambda batch: found[f"batch {batch}"])
    return found[f"batch {best}"] / BARE_PICTURES * n_pictures, best


def compared(results: Path, expected: np.ndarray, most: float) -> float:
    """Largest difference of a score; every pair has its picture."""
    scores = scores_of(results)
    assert len(list(results.glob("[0-9]*.png"))) == len(expected) == len(scores)
    difference = float(np.abs(scores - expected).max())
    assert difference <= most, (results, difference)
    return difference


@main.command(name="help")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
def help_command(rounds: int) -> None:
    """Promised: at most 3 times importing click."""
    commands = {"import click": [sys.executable, "-c", "import click"], "--help": [BIN / "siamese-eval", "--help"]}
    found = medians(in_turns(running(commands), rounds))
    ratio = found["--help"] / found["import click"]
    ratios = [Ratio("siamese-eval --help / python -c 'import click'", ratio, at_most=3)]
    print_ratios("Start-up of the command line: time of the first over that of the second", ratios)
    require_kept(ratios)


PEAK = """
import re, sys
from siamese_deploy.cli.eval import main
try:
    main(sys.argv[1:])
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@main.command()
@click.option("--images", type=click.IntRange(40), default=MANY, show_default=True)
def memory(images: int) -> None:
    """Promised: under 700 MB."""
    from siamese_deploy.demo_data import write_demo_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = export(untrained(folder), folder / "bundle")
        write_demo_data(folder / "pictures", train_classes=1, val_classes=images // 20, drawings=20)
        peaks = []
        for title, options in (("as many pairs", []), ("all pairs", ["--pairs", "all"])):
            command = evaluation(bundle, folder / "pictures/val", folder / "out", *options)[1:]
            peak = int(run([sys.executable, "-c", PEAK, *command]).splitlines()[-1]) * 1024 / 1e6
            peaks.append(Ratio(f"{images:,} pictures, {title}", peak, at_most=700))
    rows = [(peak.what, f"{peak.value:.0f}", peak.promised) for peak in peaks]
    print_table("Peak memory of siamese-eval", ("what", "MB", "promised"), rows)
    require_kept(peaks)


def evaluation(bundle: Path, pictures: Path, out: Path, *options: Any) -> Command:
    """With nothing in a cache, and not writing one either, which would only wait for the disk."""
    fixed = ["--provider", "cpu", "--no_cache"]
    return [BIN / "siamese-eval", "-v", pictures, "-o", out, "-c", bundle, *fixed, *options]


def untrained(folder: Path) -> Path:
    """A resnet18 of 224 px with random weights."""
    import torch

    from siamese_train.checkpoint import save_checkpoint
    from siamese_train.config import TrainConfig
    from siamese_train.model import SiameseNetwork

    torch.manual_seed(0)
    network = SiameseNetwork("resnet18", 224)
    config = TrainConfig(folder, folder, folder, backbone="resnet18", image_size=224, weights="none")
    optimizer = torch.optim.SGD(network.parameters())
    save_checkpoint(folder / "best.pth", epoch=1, model=network, optimizer=optimizer, config=config, run={})
    return folder / "best.pth"


def export(checkpoint: Path, bundle: Path, *options: Any) -> Path:
    run([BIN / "siamese-export", "-c", checkpoint, "-o", bundle, *options])
    return bundle


def scores_of(results: Path) -> np.ndarray:
    with open(results / "pairs.csv", newline="") as file:
        return np.array([float(row["score"]) for row in csv.DictReader(file)])


def running(commands: dict[str, Command]) -> dict[str, Callable[[], object]]:
    return {way: partial(run, command) for way, command in commands.items()}


def run(command: Command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    main()
