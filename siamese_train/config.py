"""TrainConfig: every setting of a training run, checked before any file is touched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from siamese_deploy.errors import UsageError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Defaults are the reference scripts' (github.com/sohaib023/siamese-pytorch).

    Raises:
        UsageError: a value is out of its range.
    """

    train_path: Path
    """Folder of training pictures, one sub-folder per class."""
    val_path: Path
    """Folder of validation pictures, one sub-folder per class."""
    out_path: Path
    """Folder for checkpoints and the TensorBoard summary."""
    backbone: str = "resnet18"
    """Name of a classification network in torchvision.models."""
    weights: str = "default"
    """"default" (torchvision's pretrained weights), "none" (random), or a file: backbone weights or a checkpoint."""
    learning_rate: float = 1e-4
    """Step size of Adam, in (0, 10]."""
    epochs: int = 1000
    """Passes over the training pictures."""
    save_after: int = 25
    """A checkpoint epoch_<n>.pth is kept every so many epochs."""
    image_size: int = 224
    """Height and width of the network's input, in pixels."""
    batch_size: int = 8
    """Pairs per step; a last shorter training batch is dropped."""
    seed: int = 1
    """Seeds initial weights, pair lists, augmentation and dropout."""
    workers: int = 0
    """Processes that load training pictures; 0 loads them in the training process."""
    device: str = "auto"
    """"auto" (CUDA if PyTorch has it, else CPU), "cpu", "cuda" or "cuda:N"."""

    resume: bool = False
    """Go on from the newest good checkpoint in `out_path`, if there is one."""
    resume_changed: bool = False
    """Resume even if settings or pictures changed; the epoch under way then starts again."""
    save_minutes: float = 5.0
    """last.pth is written at least every so many minutes, and at the end or when the run is interrupted."""

    def __post_init__(self) -> None:
        # Both comparisons are False for NaN.
        _check("--learning_rate", self.learning_rate, 0 < self.learning_rate <= 10, "a number above 0 and at most 10")
        _check("--epochs", self.epochs, 1 <= self.epochs <= 1_000_000, "1 to 1,000,000")
        _check("--save_after", self.save_after, 1 <= self.save_after, "at least 1")
        _check("--image_size", self.image_size, 16 <= self.image_size <= 4096, "16 to 4096 pixels")
        # BatchNorm in the head cannot learn from a single pair.
        _check("--batch_size", self.batch_size, 2 <= self.batch_size <= 65_536, "2 to 65,536 pairs")
        _check("--seed", self.seed, 0 <= self.seed < 2**32, "0 to 4,294,967,295")
        _check("--save_minutes", self.save_minutes, 0 <= self.save_minutes <= 1440, "0 to 1440 minutes")
        _check("--workers", self.workers, 0 <= self.workers <= 256, "0 to 256")

    def decisive_settings(self) -> dict[str, Any]:
        """Those that a resumed run must share with the interrupted one to end in the same weights."""
        names = ("backbone", "weights", "learning_rate", "epochs", "image_size", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are kept in a checkpoint."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _check(option: str, value: float, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{option}: expected {expected}, got {value}")
