"""Small real networks for tests, with every weight and statistic random: zero biases hide faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from siamese_deploy.demo_data import draw_character
from siamese_train.model import InputNormalisation, SiameseNetwork

SMALL = ("squeezenet1_1", 64)
"""Backbone and picture size that run and export in about a second."""


def random_network(backbone: str = SMALL[0], image_size: int = SMALL[1], seed: int = 0) -> SiameseNetwork:
    torch.manual_seed(seed)
    network = SiameseNetwork(backbone, image_size)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for module in norms:
            module.weight.uniform_(0.8, 1.2)
            module.bias.normal_(0, 0.1)
        for module in network.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.bias is not None:
                module.bias.normal_(0, 0.05)
        # BatchNorm learns such pictures' statistics, so that scores differ between pairs as in a trained network.
        network.eval()
        for module in norms:
            module.train()
            module.momentum = None  # plain mean over the steps
        for step in range(8):
            pictures = [draw_character(step, k).resize((image_size, image_size)) for k in range(8)]
            images = InputNormalisation()(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))
            network(images, images.flip(0))
        network.cls_head[9].weight.mul_(4)
    return network.eval()


def reference_checkpoint(path: Path, network: SiameseNetwork, backbone: str) -> Path:
    """A file with exactly the keys that the public reference scripts write."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    torch.save(
        {
            "epoch": 3,
            "model_state_dict": network.state_dict(),
            "backbone": backbone,
            "optimizer_state_dict": optimizer.state_dict(),
        },
        path,
    )
    return path


def own_checkpoint(path: Path, network: SiameseNetwork, backbone: str, image_size: int) -> Path:
    from siamese_train.checkpoint import save_checkpoint
    from siamese_train.config import TrainConfig

    config = TrainConfig(
        Path("train"), Path("val"), Path("out"), backbone=backbone, image_size=image_size, weights="none"
    )
    save_checkpoint(
        path,
        epoch=3,
        model=network,
        optimizer=torch.optim.Adam(network.parameters()),
        config=config,
        run={"data": {"train_images": 16}, "metrics": {"val_loss": 0.5}},
    )
    return path
