"""Where a run stands, and how it goes on from its newest good checkpoint as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import torch

from siamese_deploy.errors import CheckpointError, InputDataError, UsageError, one_line
from siamese_train.checkpoint import Checkpoint, read_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.model import SiameseNetwork
from siamese_train.weights import load_strictly


@dataclasses.dataclass
class Progress:
    """All that the training loop knows besides weights, optimiser and random state."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps taken in the epoch under way."""
    loss_sum: float = 0.0
    """Over the pairs of the epoch under way, as float32."""
    correct: int = 0
    n_pairs: int = 0
    best_loss: float = math.inf
    """Lowest validation loss of a completed epoch."""
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Metrics of each completed epoch."""

    def begin_epoch(self) -> None:
        self.step = self.correct = self.n_pairs = 0
        self.loss_sum = 0.0


def random_state() -> dict[str, Any]:
    """PyTorch's generators, which draw the dropout. Pair lists and augmentation are seeded by epoch and position."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def resume(
    config: TrainConfig, data: dict[str, Any], model: SiameseNetwork, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Put the newest good checkpoint of config.out_path into `model`, `optimizer` and PyTorch's generators.

    Returns:
        Where the run stands; None where the folder holds no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is good or holds the state of a run.
        UsageError: settings changed and --resume_changed is not given.
        InputDataError: pictures changed and --resume_changed is not given.
    """
    checkpoint = _newest_good(config.out_path)
    if checkpoint is None:
        print(one_line(f"{config.out_path}: holds no checkpoint; starting a new run"), file=sys.stderr)
        return None
    own = checkpoint.training
    if "progress" not in own:
        raise CheckpointError(f"{checkpoint.path}: holds weights and no run to resume; start from it with --weights")
    changed = _changes(own["config"], config.decisive_settings(), "--")
    changed_data = _changes(own["data"], data, "")
    if changed_data and not config.resume_changed:
        raise InputDataError(
            f"pictures changed since {checkpoint.path}: {changed_data}; --resume_changed goes on anyway"
        )
    if changed and not config.resume_changed:
        raise UsageError(f"settings changed since {checkpoint.path}: {changed}; --resume_changed goes on anyway")

    load_strictly(model, checkpoint.model_state, str(checkpoint.path))
    optimizer.load_state_dict(checkpoint.optimizer_state)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    torch.set_rng_state(own["random"]["torch"])
    if len(own["random"]["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(own["random"]["cuda"])
    progress = Progress(**own["progress"])
    if changed or changed_data:
        progress.begin_epoch()  # steps of another pair list do not count
    print(one_line(f"resuming {checkpoint.path}: epoch {progress.epoch + 1}, step {progress.step}"), file=sys.stderr)
    return progress


def _newest_good(out_path: Path) -> Checkpoint | None:
    """By time of writing. Which one it is changes how much is trained again, not what comes out."""
    files = sorted(out_path.glob("*.pth"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        try:
            return read_checkpoint(file)
        except CheckpointError as error:
            print(one_line(f"passed over: {error}"), file=sys.stderr)
    if files:
        raise CheckpointError(f"{out_path}: none of {len(files)} checkpoints can be read; choose another folder")
    return None


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str) -> str:
    return ", ".join(
        f"{prefix}{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value
    )
