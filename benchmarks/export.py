"""What export makes of every backbone, and what the precisions cost and gain.

python benchmarks/export.py backbones    all of torchvision's classification networks, about an hour on two cores
python benchmarks/export.py precisions   Omniglot's standard split, resnet18, a quarter of an hour
"""

from __future__ import annotations

import collections
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from click.testing import CliRunner
from training import omniglot

from siamese_deploy.bundle import read_bundle
from siamese_deploy.demo_data import write_demo_data
from siamese_deploy.errors import UsageError
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.preprocess import load_image
from siamese_deploy.runtime import OnnxVerifier
from siamese_export.cli import main as export_main
from siamese_train.checkpoint import save_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.model import (
    SiameseNetwork,
    classification_backbones,
)
from siamese_train.train import train

SHAPE_ARITHMETIC = {"Shape", "Range", "Gather", "Slice", "Expand", "ConstantOfShape", "Where", "Unsqueeze", "Squeeze"}
TRANSFORMERS = ("maxvit", "swin", "vit")
TOO_LARGE = ("regnet_y_128gf", "vit_h_14")
SIZE = 64


@click.group()
def main() -> None:
    print(
        f"torch {torch.__version__}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}",
        flush=True,
    )


@main.command()
@click.argument("names", nargs=-1)
def backbones(names: tuple[str, ...]) -> None:
    """Random weights and BatchNorm statistics, one process a network; the limits are those of `siamese-export`."""
    print("| backbone | px | precision | embedding error | score error | nodes | MB | seconds |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    made = collections.Counter[str]()
    for name in names or classification_backbones():
        with tempfile.TemporaryDirectory() as folder:
            row = export_in_own_process(name, Path(folder))
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        made[row[2]] += 1
    print(dict(made))
    assert set(made) <= {"fp32", "fp16"}, "not all passed"
    assert names or made["fp16"] == len(TOO_LARGE)


def export_in_own_process(name: str, folder: Path) -> tuple[Any, ...]:
    """So that the memory of one network is not missing for the next."""
    done = subprocess.run([sys.executable, __file__, "export_one", name, folder], capture_output=True, text=True)
    if done.returncode:
        return f"`{name}`", "", f"exit {done.returncode}", done.stderr.splitlines()[-1], "", "", "", ""
    manifest = read_bundle(folder / "bundle").manifest
    parity = manifest.about["parity"]
    operators = collections.Counter(node.op_type for node in onnx.load(folder / "bundle/backbone.onnx").graph.node)
    if not name.startswith(TRANSFORMERS):
        assert not SHAPE_ARITHMETIC & set(operators), (name, SHAPE_ARITHMETIC & set(operators))
    return (
        f"`{name}`",
        manifest.preprocess.size_hw[0],
        manifest.precision,
        f"{parity['relative_embedding_error']:.1e}",
        f"{max(parity['head_score_difference'], parity['end_to_end_score_difference']):.1e}",
        operators.total(),
        f"{(folder / 'bundle/backbone.onnx').stat().st_size / 1e6:.1f}",
        (folder / "seconds").read_text(),
    )


@main.command(name="export_one", hidden=True)
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
def export_one(name: str, folder: Path) -> None:
    make_checkpoint(name, folder)
    arguments = ["-c", folder / "best.pth", "-o", folder / "bundle"]
    if name in TOO_LARGE:
        refused = CliRunner().invoke(export_main, list(map(str, arguments)))
        assert refused.exit_code == 4, refused.output
        assert f" {name} takes" in refused.stderr, refused.stderr
        assert "--precision fp16" in refused.stderr, refused.stderr
        write_demo_data(folder / "pictures", train_classes=1, val_classes=10, drawings=4)
        arguments += ["--precision", "fp16", "--val_path", folder / "pictures/val", "--target_far", "0.1"]
    started_s = time.time()
    export_main(list(map(str, arguments)), standalone_mode=False)
    (folder / "seconds").write_text(f"{time.time() - started_s:.0f}")


def make_checkpoint(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    for size in (SIZE, 224):
        try:
            network = SiameseNetwork(name, size)
            break
        except UsageError:  # 64 px are too small for it, or not the one size it takes
            continue
    randomise(network)
    config = TrainConfig(folder, folder, folder, backbone=name, image_size=size, weights="none")
    save_checkpoint(
        folder / "best.pth",
        epoch=1, model=network, optimizer=torch.optim.SGD(network.parameters()), config=config, run={},
    )  # fmt: skip


@torch.no_grad()
def randomise(network: SiameseNetwork) -> None:
    """Biases that are not zero, scales and statistics that are not the same everywhere: what export fuses is used.

    Statistics of few pictures would be nearer to training and are of no use here: some channels hardly vary, and the
    deeper networks then turn rounding into answers, in PyTorch's float32 against its float64 as much as in ONNX.
    """
    for module in network.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor):
            bias.normal_(0, 0.05)
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.weight.uniform_(0.8, 1.2)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
        # What torchvision starts at nothing, so that nothing would be compared: ViT's last layer, ConvNeXt's blocks.
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            module.weight.normal_(0, 0.02)
        scale = getattr(module, "layer_scale", None)
        if isinstance(scale, torch.nn.Parameter):
            scale.uniform_(0.05, 0.2)


@main.command()
@click.option("--image_size", default=64)
@click.option("--epochs", default=14)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Instead of training one.")
def precisions(image_size: int, epochs: int, checkpoint: Path | None) -> None:
    """fp32, fp16 and both kinds of int8 of one trained network: what they cost, and how fast they are side by side."""
    data = omniglot()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if checkpoint is None:
            config = TrainConfig.with_recipe(
                train_path=data / "train", val_path=data / "val", out_path=folder / "run", weights="none",
                image_size=image_size, epochs=epochs, pairing="batch", no_flip=True, device="cpu",
            )  # fmt: skip
            train(config)
            checkpoint = folder / "run" / "best.pth"
        int8 = ["--precision", "int8", "--calibration", data / "train"]
        options: dict[str, list[Any]] = {
            "fp32": [],
            "fp16": ["--precision", "fp16"],
            "int8-cpu": int8,
            "int8-tensorrt": [*int8, "--target", "tensorrt"],
        }
        verifiers = {}
        for precision, option in options.items():
            command = [sys.executable, "-c", "from siamese_export.cli import main; main()", "-c", checkpoint]
            command += ["-o", folder / precision, "--val_path", data / "val", *option]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            verifiers[precision] = OnnxVerifier(folder / precision, provider="cpu")
        pictures = scan_image_folder(data / "val")
        images = np.stack([load_image(pictures.absolute_path(i), verifiers["fp32"].preprocess) for i in range(64)])
        speed = {batch: speeds(verifiers, images[:batch]) for batch in (1, 8, 64)}
        print("| precision | AUC | TAR at 1e-3 | FAR growth | MB | speed at batch 1 | 8 | 64 |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        assert verifiers["fp32"].bundle.manifest.about["accuracy"]["roc_auc"] >= 0.85
        for precision, verifier in verifiers.items():
            about = verifier.bundle.manifest.about
            growth = about.get("cost_of_precision", {"measured": {"far_growth": 1.0}})["measured"]["far_growth"]
            accuracy = about["accuracy"]
            print(
                f"| {precision} | {accuracy['roc_auc']:.4f} | {accuracy['tar_at_far']['0.001']:.4f} | {growth:.3f} | "
                f"{len(verifier.bundle.backbone) / 1e6:.1f} | "
                + " | ".join(f"{speed[batch][precision]:.2f}" for batch in speed) + " |"
            )  # fmt: skip
        assert speed[8]["int8-cpu"] >= 2.3


def speeds(verifiers: dict[str, OnnxVerifier], images: np.ndarray, rounds: int = 30) -> dict[str, float]:
    """Median time of fp32 over that of each precision, run in turn."""
    taken_s: dict[str, list[float]] = {precision: [] for precision in verifiers}
    for _ in range(rounds):
        for precision, verifier in verifiers.items():
            started_s = time.perf_counter()
            verifier.embed(images)
            taken_s[precision].append(time.perf_counter() - started_s)
    medians = {precision: float(np.median(times[3:])) for precision, times in taken_s.items()}
    return {precision: medians["fp32"] / median for precision, median in medians.items()}


if __name__ == "__main__":
    main()
