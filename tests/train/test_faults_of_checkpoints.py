"""Checkpoints that are damaged, hostile, of other number types or from other machines."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunCommand, assert_refused
from networks import random_network, reference_checkpoint

from siamese_deploy.errors import CheckpointError
from siamese_train.checkpoint import read_checkpoint
from siamese_train.cli import train_eval_main, train_main
from siamese_train.weights import load_initial_weights, load_safely

NETWORK = ("shufflenet_v2_x0_5", 32)
KEY = "cls_head.9.weight"


@pytest.fixture(scope="module")
def _good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_checkpoint(tmp_path_factory.mktemp("good") / "good.pth", random_network(*NETWORK), NETWORK[0])


@pytest.fixture
def good(tmp_path: Path, _good: Path) -> Path:
    return Path(shutil.copy(_good, tmp_path / "best.pth"))


def test_a_flipped_bit_is_found_or_without_effect(tmp_path: Path) -> None:
    """SIAMESE_FLIPS for more than a few hundred of them."""
    state = {"weight": torch.arange(500.0), "more": torch.linspace(0, 1, 300)}
    torch.save(state, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    random = np.random.RandomState(0)
    found = 0
    for _ in range(int(os.environ.get("SIAMESE_FLIPS", "600"))):
        flipped = bytearray(data)
        flipped[random.randint(len(data))] ^= 1 << random.randint(8)
        try:
            read = load_safely(tmp_path / "a.pth", bytes(flipped))
        except CheckpointError:
            found += 1
        else:
            assert all(torch.equal(value, read[name]) for name, value in state.items())
    assert found > 300  # most of the file are weights


def test_every_length_short_of_the_whole_is_found(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(50.0)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    for length in range(0, len(data), 13):
        with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
            load_safely(tmp_path / "a.pth", data[:length])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_nothing_in_a_checkpoint_is_executed_wherever_it_is_given(
    run: RunCommand, pictures: Path, tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for where in ("model_state_dict", "optimizer_state_dict"):
        content = torch.load(good, weights_only=True)
        content[where] = dict(content[where]) | {"x": Evil()}
        (tmp_path / where).mkdir()
        evil = tmp_path / where / "best.pth"
        torch.save(content, evil)
        train = ("--train_path", pictures, "--val_path", pictures, "-b", NETWORK[0], "--image_size", NETWORK[1])
        refused = {
            "evaluated": run(train_eval_main, "-v", pictures, "-o", tmp_path / "out", "-c", evil),
            "started from": run(train_main, *train, "-o", tmp_path / "run", "--weights", evil),
            "gone on with": run(train_main, *train, "-o", tmp_path / where, "--weights", "none", "--resume"),
        }
        for how, result in refused.items():
            assert result.exit_code == 4, (how, result.output)
            assert "damaged, or no checkpoint" in result.stderr
            assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_floats_are_converted_which_is_said(
    good: Path, kind: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(good, weights_only=True)
    weights = content["model_state_dict"][KEY]
    content["model_state_dict"][KEY] = weights.to(kind)
    torch.save(content, good)
    model = read_checkpoint(good).build_model()
    assert f"converting 1 weights ({KEY} from {kind} to torch.float32" in capsys.readouterr().err
    assert torch.equal(model.state_dict()[KEY], weights.to(kind).float())


UNUSABLE: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "nan": (lambda w: torch.full_like(w, float("nan")), "holds NaN or infinity"),
    "infinity": (lambda w: torch.full_like(w, float("-inf")), "holds NaN or infinity"),
    "infinite as float32": (lambda w: w.double() * 1e300, "holds NaN or infinity"),
    "whole numbers": (lambda w: w.int(), "torch.int32 instead of torch.float32"),
    "yes and no": (lambda w: w.bool(), "torch.bool instead of torch.float32"),
    "complex": (lambda w: w.to(torch.complex64), "expected a dense tensor, got torch.complex64"),
    "eight bits": (lambda w: w.to(torch.float8_e4m3fn), "expected a dense tensor, got torch.float8_e4m3fn"),
    "sparse": (lambda w: w.to_sparse(), "expected a dense tensor, got torch.float32 torch.sparse_coo"),
    "compressed rows": (lambda w: w.to_sparse_csr(), "expected a dense tensor"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "expected a dense tensor"),
    "without numbers": (lambda w: w.to("meta"), "expected a dense tensor"),
    "nested": (lambda w: torch.nested.nested_tensor([w]), "expected a dense tensor"),
    "one number for a trillion": (lambda w: torch.zeros(1).expand(2**40), "expected a dense tensor"),
    "a list": (lambda w: [0.0], "expected a dense tensor, got list"),
    "another shape": (lambda w: w[:, :-1].clone(), "(1, 63) instead of (1, 64)"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's, on kinds of tensors that it calls new or old
@pytest.mark.parametrize("name", UNUSABLE)
def test_weights_that_cannot_be_used_are_refused_by_name(good: Path, name: str) -> None:
    change, words = UNUSABLE[name]
    content = torch.load(good, weights_only=True)
    content["model_state_dict"][KEY] = change(content["model_state_dict"][KEY])
    torch.save(content, good)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(good).build_model()
    assert words in str(error.value)
    assert KEY in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_never_takes_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    """A record of zeros that a thousandth of the bytes unpack to; torch.save itself compresses nothing."""
    torch.save({"weight": torch.zeros(2**24)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in whole.infolist():
            bomb.writestr(record.filename, whole.read(record))
    data = (tmp_path / "bomb.pth").read_bytes()
    assert len(data) < 2**20
    with pytest.raises(CheckpointError, match="its records are larger than the file"):
        load_safely(tmp_path / "bomb.pth", data)
    content = load_safely(tmp_path / "whole.pth", (tmp_path / "whole.pth").read_bytes())
    assert content["weight"].shape == (2**24,)


def test_a_thousand_tensors_too_many_are_counted_and_five_named(good: Path) -> None:
    content = torch.load(good, weights_only=True)
    content["model_state_dict"] |= {f"backbone.x{k}": torch.zeros(1) for k in range(1000)}
    torch.save(content, good)
    with pytest.raises(CheckpointError, match=r"1000 unexpected: backbone\.x0, .*backbone\.x4, \.\.\.$"):
        read_checkpoint(good).build_model()


def test_written_on_a_gpu_that_is_not_here(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.load(good, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda _storage: "cuda:7")
        torch.save(content, good)
    assert b"cuda:7" in good.read_bytes()
    state = read_checkpoint(good).model_state
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert all(torch.equal(value, content["model_state_dict"][key]) for key, value in state.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("bare", [True, False])
def test_initial_weights_from_a_wrapped_network(
    tmp_path: Path, prefix: str, bare: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, network = random_network(*NETWORK, seed=1), random_network(*NETWORK)
    state = source.backbone.state_dict() if bare else source.state_dict()
    state = {prefix + key: value for key, value in state.items()}
    torch.save(state if bare else {"model_state_dict": state}, tmp_path / "wrapped.pth")
    assert load_initial_weights(network, NETWORK[0], str(tmp_path / "wrapped.pth"))
    assert torch.equal(network.backbone.fc.weight, source.backbone.fc.weight)
    assert f"leaving out the prefix {prefix!r}" in capsys.readouterr().err
    state["x"] = state.pop(next(iter(state)))  # all or nothing
    torch.save(state if bare else {"model_state_dict": state}, tmp_path / "wrapped.pth")
    with pytest.raises(CheckpointError, match=f"unexpected: {prefix}"):
        load_initial_weights(network, NETWORK[0], str(tmp_path / "wrapped.pth"))


def test_a_checkpoint_that_is_no_file_of_its_own(run: RunCommand, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    evaluate = ("-v", pictures, "-o", tmp_path / "out", "-c")
    assert_refused(run(train_eval_main, *evaluate, tmp_path / "empty.pth"), 4, "empty.pth: damaged, or no checkpoint")
    assert_refused(run(train_eval_main, *evaluate, tmp_path), 4, "got a folder; name the .pth file in it")
    assert_refused(run(train_eval_main, *evaluate, tmp_path / "absent.pth"), 3, "no such checkpoint")
