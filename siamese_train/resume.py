"""Where a run stands, and how it goes on from its newest good checkpoint as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from siamese_deploy.cli.run_log import warn
from siamese_deploy.errors import CheckpointError, InputDataError, UsageError, one_line
from siamese_train.checkpoint import Checkpoint, read_checkpoint
from siamese_train.config import TrainConfig
from siamese_train.learner import Learner
from siamese_train.weights import require_finite


@dataclasses.dataclass
class Progress:
    """All that the training loop knows besides weights, optimiser and random state."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps taken in the epoch under way."""
    loss_sum: float = 0.0
    """Over the pairs of the epoch under way, as float32."""
    correct: float = 0.0
    n_pairs: int = 0
    best_loss: float = math.inf
    """Lowest validation loss of a completed epoch."""
    stale_epochs: int = 0
    """Completed since the one with the lowest validation loss."""
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Metrics of each completed epoch."""
    validation: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Number and digest of the pairs that the last epoch was validated on."""
    due: list[str] = dataclasses.field(default_factory=list)
    """Checkpoints that the epoch just completed must leave; a run killed between two of them writes them again."""

    def begin_epoch(self) -> None:
        self.step = self.n_pairs = 0
        self.loss_sum = self.correct = 0.0


def resume(config: TrainConfig, data: dict[str, Any], learner: Learner) -> Progress | None:
    """Put the newest good checkpoint of config.out_path into `learner`.

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
        raise CheckpointError(
            f"{checkpoint.path}: holds weights and no run to resume; start from it with --weights",
            code="not-a-checkpoint",
        )
    # A setting that the run's version did not know yet had its default.
    defaults = TrainConfig(config.train_path, config.val_path, config.out_path).decisive_settings()
    before = defaults | own["config"] | {"device": own["device"]}
    changed = _changes(before, config.decisive_settings() | {"device": learner.processes.device.type}, "--")
    changed_data = _changes(own["data"], data, "")
    if changed_data and not config.resume_changed:
        raise InputDataError(
            f"pictures changed since {checkpoint.path}: {changed_data}; --resume_changed goes on anyway",
            code="pictures-changed",
        )
    if changed and not config.resume_changed:
        raise UsageError(
            f"settings changed since {checkpoint.path}: {changed}; --resume_changed goes on anyway",
            code="settings-changed",
        )

    source = str(checkpoint.path)
    try:
        learner.restore(source, checkpoint.model_state, checkpoint.optimizer_state, own.get("learner", {}))
    except ValueError:
        print(one_line(f"{source}: the optimiser starts anew, what it learns with changed"), file=sys.stderr)
    progress = Progress(**own["progress"])
    if changed or changed_data:
        progress.begin_epoch()  # steps of another pair list do not count
        progress.due = []  # what was due belongs to the settings before
    if changed_data or before["image_size"] != config.image_size:
        progress.best_loss, progress.stale_epochs = math.inf, 0  # a loss on other pictures is no measure for these
    print(one_line(f"resuming {source}: epoch {progress.epoch + 1}, step {progress.step}"), file=sys.stderr)
    return progress


def _newest_good(out_path: Path) -> Checkpoint | None:
    """By time of writing. Which one it is changes how much is trained again, not what comes out."""
    files = sorted(out_path.glob("*.pth"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        try:
            checkpoint = read_checkpoint(file)
            require_finite(checkpoint.model_state, str(file))
            return checkpoint
        except CheckpointError as error:
            warn(error.code, f"passed over: {error}")
    if files:
        raise CheckpointError(f"{out_path}: none of {len(files)} checkpoints can be read; choose another folder")
    return None


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str) -> str:
    return ", ".join(
        f"{prefix}{name} was {before.get(name)}, is {value}" for name, value in now.items() if before.get(name) != value
    )
