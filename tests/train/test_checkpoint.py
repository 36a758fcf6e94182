from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SMALL, own_checkpoint, random_network, reference_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from siamese_deploy.errors import CheckpointError, InputDataError
from siamese_train.checkpoint import read_checkpoint


def test_own_file_comes_back_whole(tmp_path: Path) -> None:
    network = random_network()
    checkpoint = read_checkpoint(own_checkpoint(tmp_path / "best.pth", network, *SMALL))
    assert (checkpoint.epoch, checkpoint.backbone, checkpoint.image_size) == (3, *SMALL)
    assert checkpoint.training["metrics"] == {"val_loss": 0.5}
    model = checkpoint.build_model()
    assert not model.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in model.state_dict().items())


def test_file_of_the_reference_scripts(tmp_path: Path) -> None:
    path = reference_checkpoint(tmp_path / "best.pth", random_network(), SMALL[0])
    checkpoint = read_checkpoint(path)
    assert (checkpoint.epoch, checkpoint.backbone, checkpoint.image_size) == (3, SMALL[0], 224)
    assert checkpoint.training == {}
    checkpoint.build_model()


def test_own_file_has_the_references_keys(tmp_path: Path) -> None:
    content = torch.load(own_checkpoint(tmp_path / "best.pth", random_network(), *SMALL), weights_only=True)
    assert set(content) == {
        "epoch", "model_state_dict", "backbone", "optimizer_state_dict", "siamese_toolkit",
    }  # fmt: skip
    assert {key.partition(".")[0] for key in content["model_state_dict"]} == {"backbone", "cls_head"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_prefixed(tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = random_network()
    path = reference_checkpoint(tmp_path / "best.pth", network, SMALL[0])
    content = torch.load(path, weights_only=True)
    content["model_state_dict"] = {prefix + key: value for key, value in content["model_state_dict"].items()}
    torch.save(content, path)
    state = read_checkpoint(path).model_state
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert "leaving out the prefix" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_files_that_are_no_checkpoint_are_refused_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = reference_checkpoint(tmp_path / "good.pth", random_network(), SMALL[0]).read_bytes()
    for name, content in {
        "cut.pth": good[: len(good) // 2],
        "text.pth": b"hello",
        "empty.pth": b"",
        "evil.pth": pickle.dumps({"epoch": Evil()}),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged, or no checkpoint") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary, got list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="epoch: expected int, got nothing"):
        read_checkpoint(tmp_path / "other.pth")


def test_missing_folder_and_bundle(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputDataError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="siamese-eval"):
        read_checkpoint(tiny_bundle)
    with pytest.raises(CheckpointError, match="got a folder"):
        read_checkpoint(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    network = random_network()
    wrong_backbone = read_checkpoint(reference_checkpoint(tmp_path / "a.pth", network, "mobilenet_v3_small"))
    with pytest.raises(
        CheckpointError,
        match=r"backbone mobilenet_v3_small\).* \d+ missing: (\S+, ){5}\.\.\.; \d+ unexpected: (\S+, ){5}\.\.\.",
    ):
        wrong_backbone.build_model()
    with torch.no_grad():
        network.cls_head[5].weight[3, 7] = float("nan")
    with pytest.raises(CheckpointError, match=r"cls_head\.5\.weight holds NaN"):
        read_checkpoint(reference_checkpoint(tmp_path / "b.pth", network, SMALL[0])).build_model()
    unknown = read_checkpoint(reference_checkpoint(tmp_path / "d.pth", random_network(), "my_net"))
    with pytest.raises(CheckpointError, match=r"d\.pth: .*'my_net'"):
        unknown.build_model()
    content = torch.load(own_checkpoint(tmp_path / "c.pth", random_network(), *SMALL), weights_only=True)
    content["model_state_dict"]["cls_head.9.bias"] = torch.zeros(2)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"cls_head\.9\.bias is \(1,\)|\(2,\) instead of \(1,\)"):
        read_checkpoint(tmp_path / "c.pth").build_model()
    content["model_state_dict"]["cls_head.9.bias"] = torch.zeros(1).to_sparse()
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"expected a dense tensor|damaged"):
        read_checkpoint(tmp_path / "c.pth").build_model()
    content["model_state_dict"] = {}
    for own, words in (
        ({"format": 2}, "format 2, this program reads 1"),
        ([1], "expected dict, got list"),
        ({"format": 1}, r"config\.image_size: expected 1 to 65536, got None"),
        ({"format": 1, "config": {"image_size": "64"}}, r"config\.image_size: expected 1 to 65536, got 64"),
    ):
        torch.save(content | {"siamese_toolkit": own}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("backbone", "image_size", "embedding_dim"),
    [("vit_h_14", 224, 0), ("squeezenet1_1", 65_536, 7), ("resnet18", 224, 65_536)],
)
def test_a_small_file_that_names_a_large_network_costs_nothing(
    tmp_path: Path, backbone: str, image_size: int, embedding_dim: int
) -> None:
    path = own_checkpoint(tmp_path / "a.pth", random_network(), *SMALL)
    content = torch.load(path, weights_only=True)
    content["backbone"] = backbone
    content["siamese_toolkit"]["config"] |= {"image_size": image_size, "embedding_dim": embedding_dim}
    torch.save(content, path)
    checkpoint = read_checkpoint(path)
    with TensorBytes() as counted, pytest.raises(CheckpointError, match="weights of another network"):
        checkpoint.build_model()
    assert counted.most < 2**24


class TensorBytes(TorchDispatchMode):
    """`most`: bytes of the largest tensor that any operation gave, but on the meta device, where none has any."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.most = max(self.most, tensor.nbytes)
        return result
