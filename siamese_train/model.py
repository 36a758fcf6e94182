"""SiameseNetwork(backbone, cls_head), with the reference scripts' module names, so that checkpoints load both ways."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import torchvision.models
from torch import nn

from siamese_deploy.errors import CheckpointError, EnvironmentFault, InputDataError, UsageError

# Of the ImageNet pictures that torchvision's pretrained networks learned from; RGB, for pixels in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# These two scale their input once more when pretrained. That is no part of their weights, so it is fixed here:
# otherwise a checkpoint would mean one thing when it is trained and another when it is loaded.
_EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}


class SiameseNetwork(nn.Module):
    """score = cls_head(backbone(left) * backbone(right)).

    Inputs are normalised floats (N, 3, H, W), as `InputNormalisation` makes them; embeddings are (N, dim), scores
    (P, 1) in [0, 1].
    """

    def __init__(self, backbone: str = "resnet18", image_size: int = 224) -> None:
        """Random weights; `image_size` (pixels) is only used to find the width of the embedding.

        Raises:
            UsageError: no such backbone, or one that cannot take pictures of this size.
        """
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.embedding_dim = embedding_width(self.backbone, backbone, image_size)
        self.cls_head = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(self.embedding_dim, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 64),
            nn.BatchNorm1d(64),
            nn.Sigmoid(),
            nn.Dropout(0.5),
            nn.Linear(64, 1),
            nn.Sigmoid(),
        )

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.cls_head(self.backbone(left) * self.backbone(right))
        return scores


class InputNormalisation(nn.Module):
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, scaled to [0, 1] and normalised by ImageNet's mean and std.

    Written as Cast, Transpose, Mul, Add: the order in which TensorRT takes uint8 input, with no shape arithmetic.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("scale", (1 / (255 * std)).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # contiguous: a merely permuted tensor makes the exporter write out stride arithmetic.
        return images.to(torch.float32).permute(0, 3, 1, 2).contiguous() * self.scale + self.shift


def classification_backbones() -> list[str]:
    """Names of torchvision's classification networks, sorted."""
    return sorted(torchvision.models.list_models(module=torchvision.models))


def build_backbone(name: str) -> nn.Module:
    """A torchvision classification network with its own last layer and random weights.

    Raises:
        UsageError: no such network.
    """
    known = classification_backbones()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"
        raise UsageError(f"--backbone {name!r}: no such classification network in torchvision.models; {hint}")
    network: nn.Module = torchvision.models.get_model(name, weights=None, **_EXTRA_ARGUMENTS.get(name, {}))
    return network


def embedding_width(network: nn.Module, name: str, image_size: int) -> int:
    """Numbers per picture that the network gives, found by running it on a black one.

    Raises:
        UsageError: it cannot take pictures of `image_size` pixels.
    """
    was_training = network.training
    try:
        with torch.no_grad():
            output = network.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"backbone {name} cannot take pictures of {image_size} px a side: {reason}") from error
    network.train(was_training)
    return int(output.shape[1])


def load_initial_weights(model: SiameseNetwork, backbone: str, weights: str) -> None:
    """Fill `model` as --weights says: "none" leaves it random, "default" and a file load the backbone (or everything).

    Raises:
        EnvironmentFault: pretrained weights are not on this machine and cannot be fetched.
        InputDataError: no such file.
        CheckpointError: the file is damaged or belongs to another network.
    """
    if weights == "none":
        return
    if weights == "default":
        state = _pretrained_state(backbone)
    elif not Path(weights).is_file():
        raise InputDataError(f"--weights {weights}: no such file; expected default, none or a file")
    else:
        state = _read_state(Path(weights))
    if isinstance(state.get("model_state_dict"), dict):
        load_strictly(model, state["model_state_dict"], weights)
    else:
        load_strictly(model.backbone, _without_auxiliary(state), weights)


def load_strictly(module: nn.Module, state: dict[str, Any], source: str) -> None:
    """module.load_state_dict with one-line errors that name what does not fit.

    Raises:
        CheckpointError: missing or unexpected keys, other shapes, or values that are no finite dense tensors.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{source}: {key}: expected a dense tensor, got {type(value).__name__}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{source}: {key} holds NaN or infinity; take an earlier checkpoint of the run")
    own = module.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unexpected" for key in state if key not in own]
    wrong += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{source}: weights of another network: {'; '.join(wrong[:5])}{more}")
    module.load_state_dict(state)


def _pretrained_state(backbone: str) -> dict[str, Any]:
    url: str = torchvision.models.get_model_weights(backbone).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=_hash_prefix(file))
        except (URLError, OSError, RuntimeError) as error:
            raise EnvironmentFault(
                f"the pretrained weights of {backbone} are not on this machine and cannot be fetched ({error}); place "
                f"{url} at {file}, or train from random weights with --weights none"
            ) from error
    elif not hashlib.sha256(file.read_bytes()).hexdigest().startswith(_hash_prefix(file)):
        raise CheckpointError(f"{file}: damaged (its SHA-256 does not begin with its name's); place {url} there again")
    return _read_state(file)


def _hash_prefix(file: Path) -> str:
    """torchvision names its files <network>-<first digits of the SHA-256>.pth."""
    return file.stem.rpartition("-")[2]


def _read_state(file: Path) -> dict[str, Any]:
    from siamese_train.checkpoint import load_safely

    return load_safely(file, file.read_bytes())


def _without_auxiliary(state: dict[str, Any]) -> dict[str, Any]:
    """Without the extra classifiers that GoogLeNet and Inception use in training only."""
    return {key: value for key, value in state.items() if not str(key).startswith(("aux1.", "aux2.", "AuxLogits."))}
