from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from networks import SMALL, random_network

from siamese_deploy.errors import CheckpointError, EnvironmentFault, InputDataError
from siamese_train.model import SiameseNetwork
from siamese_train.weights import load_initial_weights


def test_pretrained_weights_offline_name_the_file_to_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    network = SiameseNetwork("squeezenet1_1", 64)
    place = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(EnvironmentFault, match="--weights none") as error:
        load_initial_weights(network, "squeezenet1_1", "default")
    assert str(place) in str(error.value)
    place.write_bytes(b"half a download")
    with pytest.raises(CheckpointError, match="damaged"):
        load_initial_weights(network, "squeezenet1_1", "default")


def test_initial_weights_from_a_file_of_backbone_weights_or_a_checkpoint(tmp_path: Path) -> None:
    source = random_network(seed=1)
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save({"model_state_dict": source.state_dict()}, tmp_path / "whole.pth")

    network = SiameseNetwork(*SMALL)
    head_before = network.cls_head[1].weight.clone()
    load_initial_weights(network, SMALL[0], str(tmp_path / "backbone.pth"))
    assert torch.equal(network.backbone.features[0].weight, source.backbone.features[0].weight)
    assert torch.equal(network.cls_head[1].weight, head_before)

    load_initial_weights(network, SMALL[0], str(tmp_path / "whole.pth"))
    assert torch.equal(network.cls_head[1].weight, source.cls_head[1].weight)

    with pytest.raises(CheckpointError, match=r"weights of another network; \d+ missing: .*; \d+ unexpected: "):
        load_initial_weights(SiameseNetwork("mobilenet_v3_small", 64), "", str(tmp_path / "backbone.pth"))
    with torch.no_grad():
        source.cls_head[1].weight[0, 0] = float("nan")
    torch.save({"model_state_dict": source.state_dict()}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"cls_head\.1\.weight holds NaN"):
        load_initial_weights(network, SMALL[0], str(tmp_path / "nan.pth"))
    with pytest.raises(InputDataError, match="expected default, none or a file"):
        load_initial_weights(network, SMALL[0], str(tmp_path / "absent.pth"))


def test_names_of_torchvisions_older_files(tmp_path: Path) -> None:
    """Its first BatchNorm counted nothing, and DenseNet's layers were called norm.1 and conv.2."""
    network = SiameseNetwork("densenet121", 32)
    source = SiameseNetwork("densenet121", 32).backbone.state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value
        for key, value in source.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    assert load_initial_weights(network, "densenet121", str(tmp_path / "old.pth"))
    assert all(
        torch.equal(value, source[key])
        for key, value in network.backbone.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )


def test_weights_none_leaves_the_network_alone() -> None:
    network = random_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_initial_weights(network, SMALL[0], "none")
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
