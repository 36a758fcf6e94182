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
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from measuring import in_turns, medians, print_machine, print_table
from training import omniglot

BIN = Path(sys.executable).parent
HERE = Path(__file__).parent
BATCHES = (1, 2, 4, 8, 16, 32)
MANY = 10_000
OPEN_LIMITS = ["--max_auc_drop", "1", "--max_tar_drop", "1", "--max_far_growth", "1e9"]

Command = list[Any]


@click.group()
def main() -> None:
    print_machine("onnxruntime", "numpy", "pillow", "torch", "matplotlib")


@main.command()
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5)
def pictures(checkpoint: Path | None, rounds: int) -> None:
    """Promised: at least 8 times faster in float32 and 16 times in int8, with the same pairs and scores."""
    val = omniglot() / "val"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = checkpoint is not None
        checkpoint = checkpoint or untrained(folder)
        limits = [] if trained else OPEN_LIMITS
        fp32 = export(checkpoint, folder / "fp32")
        int8 = export(
            checkpoint, folder / "int8", "--precision", "int8", "--calibration", omniglot() / "train",
            "--val_path", val, *limits,
        )  # fmt: skip
        style = [sys.executable, HERE / "reference_style.py", "-v", val, "-o", folder / "style", "-c", checkpoint]
        ways = {
            "reference style": style,
            "fp32": evaluation(fp32, val, folder / "fp32-out", "--images", "all"),
            "int8": evaluation(int8, val, folder / "int8-out", "--images", "all"),
        }
        times = in_turns({way: lambda c=command: run(c) for way, command in ways.items()}, rounds)
        expected = np.loadtxt(folder / "style/scores.csv")
        differences = {}
        for way, most in (("fp32", 1e-4), ("int8", 0.2)):
            scores = scores_of(folder / f"{way}-out")
            assert len(list((folder / f"{way}-out").glob("*.png"))) == len(expected) == len(scores)
            differences[way] = float(np.abs(scores - expected).max())
            assert differences[way] <= most, (way, differences)
        slow = statistics.median(times["reference style"])
        rows = [[f"reference style, {len(expected)} pairs", f"{slow:.1f}", "1.0", "", ""]]
        missed = []
        for way, least in (("fp32", 8.0), ("int8", 16.0)):
            ratio = slow / statistics.median(times[way])
            rows.append(
                [f"siamese-eval, {way}", f"{slow / ratio:.2f}", f"{ratio:.1f}", f"{differences[way]:.1e}", least]
            )
            if ratio < least:
                missed.append(way)
        print_table("Whole evaluation", ("what", "seconds", "times faster", "score difference", "promised"), rows)
        assert not missed, missed


@main.command()
@click.option("--rounds", default=5)
def none(rounds: int) -> None:
    """Promised: at most 1.15 times the bare backbone over all pictures, plus start-up."""
    from siamese_deploy import OnnxVerifier
    from siamese_deploy.image_folder import scan_image_folder
    from siamese_deploy.preprocess import load_image

    val = omniglot() / "val"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = export(untrained(folder), folder / "bundle")
        verifier = OnnxVerifier(bundle, provider="cpu")
        pictures = scan_image_folder(val)
        images = np.stack([load_image(pictures.absolute_path(k), verifier.preprocess) for k in range(max(BATCHES))])

        def bare(batch: int) -> None:
            for start in range(0, len(images), batch):
                verifier._backbone.run(None, {"images": images[start : start + batch]})

        few = folder / "few"
        for class_name in pictures.class_names[:2]:
            (few / class_name).mkdir(parents=True)
            for picture in sorted((val / class_name).iterdir())[:2]:
                (few / class_name / picture.name).write_bytes(picture.read_bytes())
        ways = {f"batch {batch}": lambda b=batch: bare(b) for batch in BATCHES}
        ways["start"] = lambda: run(evaluation(bundle, few, folder / "few-out", "--images", "none"))
        ways["whole"] = lambda: run(evaluation(bundle, val, folder / "out", "--images", "none"))
        found = medians(in_turns(ways, rounds))
        best = min(BATCHES, key=lambda batch: found[f"batch {batch}"])
        bare_s = found[f"batch {best}"] / len(images) * len(pictures)
        ratio = (found["whole"] - found["start"]) / bare_s
        rows = [
            [f"bare backbone, {len(pictures)} pictures, batch {best}", f"{bare_s:.2f}", "1.00", ""],
            ["start-up (siamese-eval of four pictures)", f"{found['start']:.2f}", "", ""],
            ["siamese-eval --images none without it", f"{found['whole'] - found['start']:.2f}", f"{ratio:.3f}", 1.15],
        ]  # fmt: skip
        print_table("Evaluation without pair pictures", ("what", "seconds", "ratio", "promised"), rows)
        assert ratio <= 1.15, ratio


@main.command(name="help")
@click.option("--rounds", default=15)
def help_command(rounds: int) -> None:
    """Promised: at most 3 times importing click."""
    ways = {"import click": [sys.executable, "-c", "import click"], "--help": [BIN / "siamese-eval", "--help"]}
    found = medians(in_turns({way: lambda c=command: run(c) for way, command in ways.items()}, rounds))
    ratio = found["--help"] / found["import click"]
    rows = [["siamese-eval --help, against python -c 'import click'", f"{ratio:.2f}", 3]]
    print_table("Start-up of the command line", ("what", "ratio", "promised"), rows)
    assert ratio <= 3, ratio


PEAK = """
import re, sys
from siamese_deploy.cli.eval import main
try:
    main(sys.argv[1:])
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@main.command()
@click.option("--images", default=MANY)
def memory(images: int) -> None:
    """Promised: under 700 MB."""
    from siamese_deploy.demo_data import write_demo_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = export(untrained(folder), folder / "bundle")
        write_demo_data(folder / "pictures", train_classes=1, val_classes=images // 20, drawings=20)
        peaks = []
        for options in ([], ["--pairs", "all"]):
            command = evaluation(bundle, folder / "pictures/val", folder / "out", *options)[1:]
            peaks.append(int(run([sys.executable, "-c", PEAK, *command]).splitlines()[-1]) * 1024 / 1e6)
        rows = [[f"{images:,} pictures, {pairs}", f"{peak:.0f} MB", "700 MB"]
                for pairs, peak in zip(("as many pairs", "all pairs"), peaks, strict=True)]  # fmt: skip
        print_table("Peak memory of siamese-eval", ("what", "peak", "promised"), rows)
        assert max(peaks) < 700, peaks


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


def run(command: Command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    main()
