"""All of torchvision's classification networks as backbones.

They are built and run on PyTorch's meta device, where a tensor has a shape but no numbers: even the largest takes
seconds and no memory. One network of each family (DenseNet takes longer) is part of every run, the others are slow.

    python tests/train/test_backbones.py    writes the table of docs/backbones.md anew, in half a minute
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from siamese_deploy.errors import UsageError
from siamese_train.model import SiameseNetwork, build_backbone, classification_backbones, input_sizes

PAGE = Path(__file__).parent.parent.parent / "docs" / "backbones.md"
HEADING = "| name | embedding width | parameters (millions) | side of the pictures (px) |\n| --- | --- | --- | --- |\n"
REGENERATE = "the code finds another; write the table anew: python tests/train/test_backbones.py"
LEAST = 16
"""The smallest --image_size."""

ONE_OF_EACH_FAMILY = [
    "alexnet", "convnext_tiny", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
    "swin_v2_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip
REALLY_RUN = [
    "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_v2_t", "vit_b_16",
]  # fmt: skip
every_backbone = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ONE_OF_EACH_FAMILY else pytest.mark.slow)
        for name in classification_backbones()
    ],
)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Networks built inside are on the meta device.

    Not `with torch.device("meta")`: RegNet computes its widths with tensors, which need their numbers.
    """
    hooks = [
        register_module_parameter_registration_hook(
            lambda module, name, value: nn.Parameter(value.detach().to("meta"))
        ),
        register_module_buffer_registration_hook(lambda module, name, value: value.to("meta")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def found(name: str) -> tuple[SiameseNetwork, int, str]:
    """The network on the meta device, the smallest pictures it takes, and its rule, as the error message has it."""
    with on_meta():
        try:
            return SiameseNetwork(name, LEAST), LEAST, "any"
        except UsageError as error:
            rule = re.search(
                r"(?:it needs|takes pictures of) ((?:at least |exactly )?(\d+)(?: to \d+)?)[ ;]", str(error)
            )
        assert rule
        return SiameseNetwork(name, int(rule[2])), int(rule[2]), rule[1]


def table_row(name: str) -> str:
    network, _, rule = found(name)
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    return f"| `{name}` | {network.embedding_dim} | {parameters / 1e6:.1f} | {rule} |\n"


@every_backbone
def test_a_training_step_gives_every_parameter_a_gradient(name: str) -> None:
    network, size, _ = found(name)
    assert all(module.training for module in network.modules())
    embeddings = network.backbone(torch.zeros(2, 3, size, size, device="meta"))
    assert embeddings.shape == (2, 1000)
    scores = network.cls_head(embeddings * embeddings.flip(0))
    assert scores.shape == (2, 1)
    scores.sum().backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@every_backbone
def test_embedding_dim_sets_the_width(name: str) -> None:
    with on_meta():
        assert SiameseNetwork(name, found(name)[1], embedding_dim=64).embedding_dim == 64


@every_backbone
def test_the_documented_row_is_what_the_code_finds(name: str) -> None:
    assert table_row(name) in PAGE.read_text("utf-8"), REGENERATE


def test_the_table_lists_every_classification_network() -> None:
    names = re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert names == classification_backbones(), REGENERATE
    assert len(names) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", REALLY_RUN)
def test_a_real_training_step_at_the_smallest_size_gives_finite_gradients(name: str) -> None:
    size = found(name)[1]
    torch.manual_seed(0)
    network = SiameseNetwork(name, size)
    # With 2 pairs of the smallest pictures BatchNorm sees 2 numbers a channel, and gradients grow to 1e20 (resnet50).
    scores = network(torch.randn(4, 3, size, size), torch.randn(4, 3, size, size))
    nn.functional.binary_cross_entropy(scores, torch.tensor([[0.0], [1.0], [0.0], [1.0]])).backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_b_16", 64, "backbone vit_b_16 takes pictures of exactly 224 px a side, got 64: use --image_size 224"),
        ("vit_b_16", 256, "backbone vit_b_16 takes pictures of exactly 224 px a side, got 256: use --image_size 224"),
        (
            "squeezenet1_1",
            16,
            "backbone squeezenet1_1 cannot take pictures of 16 px a side: it needs at least 17; raise --image_size",
        ),
    ],
)
def test_pictures_of_a_wrong_size_are_refused_with_the_rule(name: str, size: int, message: str) -> None:
    with on_meta(), pytest.raises(UsageError) as error:
        SiameseNetwork(name, size)
    assert str(error.value) == message


def test_errors_that_have_nothing_to_do_with_the_size_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([RuntimeError("DefaultCPUAllocator: can't allocate memory")])

    def full(self: nn.AdaptiveAvgPool2d, images: torch.Tensor) -> torch.Tensor:
        for failure in failures:  # once
            raise failure
        return images.mean((2, 3), keepdim=True)

    monkeypatch.setattr(nn.AdaptiveAvgPool2d, "forward", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        SiameseNetwork("squeezenet1_1", 64)


def test_finding_the_sizes_leaves_the_network_as_it_was() -> None:
    network = build_backbone("squeezenet1_1")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert input_sizes(network) == (17, None)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


if __name__ == "__main__":
    introduction, _, _ = PAGE.read_text("utf-8").partition(HEADING)
    PAGE.write_text(introduction + HEADING + "".join(map(table_row, classification_backbones())), "utf-8")
