"""SiameseNetwork(backbone, cls_head), with the reference scripts' module names, so that checkpoints load both ways."""

from __future__ import annotations

import bisect
import copy
import difflib
from typing import Any

import torch
import torchvision.models
from torch import nn

from siamese_deploy.errors import UsageError

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

    def __init__(self, backbone: str = "resnet18", image_size: int = 224, embedding_dim: int = 0) -> None:
        """Random weights; `image_size` (pixels) is only used to find the width of the embedding.

        Args:
            embedding_dim: outputs that the backbone's last layer gets; 0 leaves it as torchvision has it.

        Raises:
            UsageError: no such backbone, or one that cannot take pictures of this size.
        """
        super().__init__()
        self.backbone = build_backbone(backbone, embedding_dim)
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


def build_backbone(name: str, embedding_dim: int = 0) -> nn.Module:
    """A torchvision classification network with random weights, and its own last layer or one of `embedding_dim`.

    Raises:
        UsageError: no such network.
    """
    known = classification_backbones()
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"
        raise UsageError(f"--backbone {name!r}: no such classification network in torchvision.models; {hint}")
    arguments = _EXTRA_ARGUMENTS.get(name, {}) | ({"num_classes": embedding_dim} if embedding_dim else {})
    network: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return network


def embedding_width(network: nn.Module, name: str, image_size: int) -> int:
    """Numbers per picture that the network gives.

    Raises:
        UsageError: it cannot take pictures of `image_size` pixels.
    """
    bare = _without_numbers(network)
    try:
        with torch.no_grad():
            output = bare(torch.zeros(1, 3, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError) as error:
        smallest, largest = input_sizes(network)
        if smallest <= image_size <= (largest or image_size):
            raise  # the size is not to blame
        if largest is None:
            raise UsageError(
                f"backbone {name} cannot take pictures of {image_size} px a side: it needs at least {smallest}; "
                "raise --image_size"
            ) from error
        taken = f"exactly {largest}" if smallest == largest else f"{smallest} to {largest}"
        raise UsageError(
            f"backbone {name} takes pictures of {taken} px a side, got {image_size}: use --image_size {largest}"
        ) from error
    return int(output.shape[1])


def input_sizes(network: nn.Module) -> tuple[int, int | None]:
    """Smallest and largest side, in pixels, of the square pictures that the network takes; None: no upper limit.

    Found by trying: all networks of torchvision.models take 224 px, and either every larger size or none from 448 on.
    """
    bare = _without_numbers(network)

    def takes(size: int) -> bool:
        try:
            with torch.no_grad():
                bare(torch.zeros(1, 3, size, size, device="meta"))
        except (RuntimeError, AssertionError):
            return False
        return True

    smallest = bisect.bisect_left(range(1, 225), True, key=takes) + 1
    if takes(448):
        return smallest, None
    return smallest, 223 + bisect.bisect_left(range(224, 449), True, key=lambda size: not takes(size))


def _without_numbers(network: nn.Module) -> nn.Module:
    """A copy on PyTorch's meta device, where running it works out nothing but shapes; in inference mode."""
    tensors: list[torch.Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor.detach().to("meta") for tensor in tensors}).eval()
