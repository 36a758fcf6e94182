"""`siamese-train` and `siamese-train-eval`. torch is imported after the options are parsed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH, SEED, Command
from siamese_deploy.cli.eval import evaluate_into
from siamese_deploy.errors import needs_extra, one_line

if TYPE_CHECKING:
    from siamese_deploy.verifier import Verifier


@click.command(cls=Command, name="siamese-train")
@click.option("--train_path", required=True, type=PATH, help="Folder of training pictures: one sub-folder a class.")
@click.option("--val_path", required=True, type=PATH, help="Folder of validation pictures: one sub-folder a class.")
@click.option("-o", "--out_path", required=True, type=PATH, help="Folder for checkpoints and TensorBoard summary.")
@click.option("-b", "--backbone", default="resnet18", help="Classification network from torchvision.models.")
@click.option("-lr", "--learning_rate", type=float, default=1e-4, help="Step size of Adam.")
@click.option("-e", "--epochs", type=int, default=1000, help="Passes over the training pictures.")
@click.option("-s", "--save_after", type=int, default=25, help="Keep a checkpoint every so many epochs.")
@click.option(
    "--weights",
    default="default",
    help="Initial weights: default (torchvision's pretrained ones), none (random), or a file.",
)
@click.option("--image_size", type=int, default=224, help="Height and width of the network's input, in pixels.")
@click.option("--batch_size", type=int, default=8, help="Pairs per step.")
@click.option("--seed", type=int, default=1, help="Seed of weights, pair lists, augmentation and dropout.")
@click.option("--workers", type=int, default=0, help="Processes that load pictures; 0: the training process itself.")
@click.option("--device", default="auto", help="auto (CUDA if PyTorch has it, else CPU), cpu, cuda or cuda:N.")
@click.option("--resume", is_flag=True, help="Go on from the newest good checkpoint in OUT_PATH, if there is one.")
@click.option("--resume_changed", is_flag=True, help="Resume even if settings or pictures changed.")
@click.option("--save_minutes", type=float, default=5.0, help="Write last.pth at least every so many minutes.")
def train_main(**settings: Any) -> None:
    """Train a Siamese network; writes best.pth, epoch_<n>.pth, last.pth and a TensorBoard summary."""
    from siamese_train.config import TrainConfig

    config = TrainConfig(**settings)
    with needs_extra("train"):
        from siamese_train.train import train
    best = train(config)
    click.echo(one_line(f"best checkpoint: {best}"))


@click.command(cls=Command, name="siamese-train-eval")
@click.option("-v", "--val_path", required=True, type=PATH, help="Folder: one sub-folder a class.")
@click.option("-o", "--out_path", required=True, type=PATH, help="Folder for metrics, pairs and pictures.")
@click.option("-c", "--checkpoint", required=True, type=PATH, help="Checkpoint file (.pth).")
@click.option("--seed", type=SEED, default=1, help="Seed of the pair list.")
@click.option("--device", default="auto", help="auto (CUDA if PyTorch has it, else CPU), cpu, cuda or cuda:N.")
def train_eval_main(val_path: Path, out_path: Path, checkpoint: Path, seed: int, device: str) -> None:
    """Evaluate a checkpoint with PyTorch: loss, accuracy, pairs.csv and one picture per pair."""

    def open_verifier() -> Verifier:
        with needs_extra("train"):
            from siamese_train.checkpoint import read_checkpoint
            from siamese_train.torch_verifier import TorchVerifier, choose_device
        verifier = TorchVerifier.from_checkpoint(read_checkpoint(checkpoint), choose_device(device))
        click.echo(f"provider: {verifier.provider} (pytorch)")
        return verifier

    evaluate_into(open_verifier, val_path, out_path, seed)
