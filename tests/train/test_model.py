from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from networks import random_network
from torchvision import transforms

from siamese_deploy.errors import UsageError
from siamese_train.model import (
    InputNormalisation,
    SiameseNetwork,
    build_backbone,
    classification_backbones,
    embedding_width,
)

HEAD_SHAPES = {
    "cls_head.1.weight": (512, 1000),
    "cls_head.1.bias": (512,),
    "cls_head.2.weight": (512,),
    "cls_head.2.bias": (512,),
    "cls_head.2.running_mean": (512,),
    "cls_head.2.running_var": (512,),
    "cls_head.2.num_batches_tracked": (),
    "cls_head.5.weight": (64, 512),
    "cls_head.5.bias": (64,),
    "cls_head.6.weight": (64,),
    "cls_head.6.bias": (64,),
    "cls_head.6.running_mean": (64,),
    "cls_head.6.running_var": (64,),
    "cls_head.6.num_batches_tracked": (),
    "cls_head.9.weight": (1, 64),
    "cls_head.9.bias": (1,),
}


class ReferenceForm(torch.nn.Module):
    """The form DESIGN gives for the public reference scripts' network: what their file must load into."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(weights=None)
        layers: list[tuple[int, torch.nn.Module]] = [
            (0, torch.nn.Dropout(0.5)), (1, torch.nn.Linear(1000, 512)), (2, torch.nn.BatchNorm1d(512)),
            (3, torch.nn.ReLU()), (4, torch.nn.Dropout(0.5)), (5, torch.nn.Linear(512, 64)),
            (6, torch.nn.BatchNorm1d(64)), (7, torch.nn.Sigmoid()), (8, torch.nn.Dropout(0.5)),
            (9, torch.nn.Linear(64, 1)), (10, torch.nn.Sigmoid()),
        ]  # fmt: skip
        self.cls_head = torch.nn.Sequential(OrderedDict((str(index), layer) for index, layer in layers))


def test_resnet18_keys_and_shapes_never_change() -> None:
    shapes = {key: tuple(value.shape) for key, value in SiameseNetwork("resnet18").state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if key.startswith("cls_head.")} == HEAD_SHAPES
    assert len(shapes) == 122 + 16
    listing = "\n".join(f"{key} {shape}" for key, shape in shapes.items())
    assert (
        hashlib.sha256(listing.encode()).hexdigest()
        == "461cfb64edb3c3c190399435ecca6091e6a2803168c3c2eb7290fdd2f48f18c0"
    )


def test_weights_load_both_ways_and_give_the_same_scores() -> None:
    ours, theirs = random_network("resnet18", 64), ReferenceForm()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.eval()
    left, right = torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.cls_head(theirs.backbone(left) * theirs.backbone(right))
        assert torch.equal(ours(left, right), expected)


def test_dropout_probabilities_are_the_references() -> None:
    dropouts = [module.p for module in SiameseNetwork().cls_head if isinstance(module, torch.nn.Dropout)]
    assert dropouts == [0.5, 0.5, 0.5]


def test_normalisation_is_torchvisions() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    usual = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = torch.stack([usual(image) for image in pixels])
    assert torch.allclose(InputNormalisation()(torch.from_numpy(pixels)), expected, atol=1e-6)
    assert InputNormalisation().state_dict() == {}


def test_backbones_are_the_classification_networks() -> None:
    names = classification_backbones()
    assert {"resnet18", "mobilenet_v3_small", "efficientnet_b0", "squeezenet1_1", "vit_b_16"} <= set(names)
    assert not {"fasterrcnn_resnet50_fpn", "raft_small", "r3d_18", "quantized_resnet18"} & set(names)
    assert embedding_width(build_backbone("squeezenet1_1"), "squeezenet1_1", 64) == 1000


@pytest.mark.parametrize("name", ["regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "densenet121", "inception_v3"])
def test_networks_of_other_families_are_built_and_left_in_training_mode(name: str) -> None:
    network = SiameseNetwork(name, 96)
    assert network.embedding_dim == 1000
    assert all(module.training for module in network.modules())


def test_googlenet_means_the_same_with_and_without_pretrained_weights() -> None:
    assert build_backbone("googlenet").transform_input is True
    assert build_backbone("googlenet").aux_logits is False


def test_unknown_backbones_are_met_with_near_names() -> None:
    with pytest.raises(UsageError, match="did you mean resnet18"):
        SiameseNetwork("resnet-18")
    with pytest.raises(UsageError, match="no such classification network"):
        SiameseNetwork("fasterrcnn_resnet50_fpn")


def test_pictures_a_backbone_cannot_take() -> None:
    with pytest.raises(UsageError, match="vit_b_16 takes pictures of exactly 224 px a side, got 64"):
        SiameseNetwork("vit_b_16", 64)
