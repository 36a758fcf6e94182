"""Checkpoint files: weights, optimiser and how they came about. Read with `weights_only` only.

The keys `epoch`, `model_state_dict`, `backbone` and `optimizer_state_dict` are the reference scripts'; a file with just
those loads here, and theirs load ours, which has one key more, `siamese_toolkit`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siamese_deploy.durable_files import write_atomically
from siamese_deploy.errors import CheckpointError, InputDataError, UsageError
from siamese_train.config import TrainConfig
from siamese_train.model import SiameseNetwork
from siamese_train.weights import load_safely, load_strictly, require_finite, require_fit, without_wrapper_prefixes

REFERENCE_IMAGE_SIZE = 224
_REQUIRED = {"epoch": int, "model_state_dict": dict, "backbone": str, "optimizer_state_dict": dict}


@dataclass(frozen=True)
class Checkpoint:
    epoch: int
    """Epochs trained."""
    backbone: str
    image_size: int
    """Pixels; 224 where the file does not say (the reference scripts know no other size)."""
    embedding_dim: int
    """Outputs that the backbone's last layer was given; 0: its own."""
    model_state: dict[str, Any]
    optimizer_state: dict[str, Any]
    training: dict[str, Any]
    """Settings, counts and metrics; empty for a file of the reference scripts."""
    sha256: str
    """Of the file."""
    path: Path

    def build_model(self) -> SiameseNetwork:
        """The network with these weights, on the CPU, in inference mode.

        Raises:
            CheckpointError: the backbone is unknown, or the weights do not fit it or are not finite.
        """
        source = f"{self.path} (backbone {self.backbone})"
        try:
            # A small file may name a large network, of which only the shapes are there on the meta device.
            with torch.device("meta"):
                bare = SiameseNetwork(self.backbone, self.image_size, self.embedding_dim)
            require_fit(bare, self.model_state, source)
            model = SiameseNetwork(self.backbone, self.image_size, self.embedding_dim)
        except UsageError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        load_strictly(model, self.model_state, source)
        return model.eval()


def save_checkpoint(
    path: Path,
    *,
    epoch: int,
    model: SiameseNetwork,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    run: dict[str, Any],
) -> None:
    """Write a checkpoint atomically. `run` is what `Checkpoint.training` holds besides the settings: plain values.

    Raises:
        CheckpointError: a weight is NaN or infinite; nothing is written.
        OSError: the file cannot be written; the earlier one is untouched.
    """
    require_finite(model.state_dict(), str(path))
    content = {
        "epoch": epoch,
        "model_state_dict": model.state_dict(),
        "backbone": config.backbone,
        "optimizer_state_dict": optimizer.state_dict(),
        "siamese_toolkit": {"format": 1, "config": config.to_json(), **run},
    }
    # By way of memory: PyTorch reports a disk that fills while it writes as an error of its own kind.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of ours or of the reference scripts.

    Raises:
        InputDataError: no such file.
        CheckpointError: not a checkpoint, damaged, or of a newer format.
    """
    if not path.exists():
        raise InputDataError(f"{path}: no such checkpoint", code="not-found")
    if path.is_dir():
        bundle = (path / "manifest.json").exists()
        hint = "a bundle; evaluate it with siamese-eval" if bundle else "a folder; name the .pth file in it"
        raise CheckpointError(f"{path}: expected a checkpoint file, got {hint}", code="not-a-checkpoint")
    data = path.read_bytes()  # once, so that the digest is that of the weights whatever happens to the file meanwhile
    content = load_safely(path, data)
    for key, kind in _REQUIRED.items():
        if not isinstance(content.get(key), kind):
            found = "nothing" if key not in content else type(content[key]).__name__
            raise CheckpointError(
                f"{path}: is no checkpoint ({key}: expected {kind.__name__}, got {found})", code="not-a-checkpoint"
            )
    own = content.get("siamese_toolkit", {})
    if not isinstance(own, dict):
        raise CheckpointError(f"{path}: siamese_toolkit: expected dict, got {type(own).__name__}")
    if own and (type(own.get("format")) is not int or own["format"] != 1):  # of a tensor, != gives a tensor
        raise CheckpointError(
            f"{path}: format {own.get('format')}, this program reads 1; use a newer version of it", code="other-version"
        )
    settings = {"image_size": REFERENCE_IMAGE_SIZE, "embedding_dim": 0}
    if own:
        saved = own.get("config")
        saved = {"embedding_dim": 0} | saved if isinstance(saved, dict) else {}
        for name, least in (("image_size", 1), ("embedding_dim", 0)):
            value = saved.get(name)
            if type(value) is not int or not least <= value <= 2**16:  # True is an int, too
                raise CheckpointError(f"{path}: siamese_toolkit: config.{name}: expected {least} to 65536, got {value}")
            settings[name] = value
    return Checkpoint(
        epoch=content["epoch"],
        backbone=content["backbone"],
        image_size=settings["image_size"],
        embedding_dim=settings["embedding_dim"],
        model_state=without_wrapper_prefixes(content["model_state_dict"], str(path)),
        optimizer_state=content["optimizer_state_dict"],
        training=own,
        sha256=hashlib.sha256(data).hexdigest(),
        path=path,
    )
