"""Weights from files: what a network starts with, and what a checkpoint holds. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import torchvision.models
from torch import nn

from siamese_deploy.errors import CheckpointError, EnvironmentFault, InputDataError, one_line
from siamese_train.model import SiameseNetwork

# What DataParallel, DistributedDataParallel and torch.compile put before every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def load_initial_weights(model: SiameseNetwork, backbone: str, weights: str, embedding_dim: int = 0) -> bool:
    """Fill `model` as --weights says: "none" leaves it random, "default" and a file load the backbone (or everything).

    A last layer of `embedding_dim` outputs that the weights do not have stays random.

    Returns:
        Whether the backbone has learned weights in all its layers.

    Raises:
        EnvironmentFault: pretrained weights are not on this machine and cannot be fetched.
        InputDataError: no such file.
        CheckpointError: the file is damaged or belongs to another network.
    """
    if weights == "none":
        return False
    if weights == "default":
        state = _pretrained_state(backbone)
    elif not Path(weights).is_file():
        raise InputDataError(f"--weights {weights}: no such file; expected default, none or a file", code="not-found")
    else:
        state = load_safely(Path(weights), Path(weights).read_bytes())
    if isinstance(state.get("model_state_dict"), dict):
        load_strictly(model, without_wrapper_prefixes(state["model_state_dict"], weights), weights)
        return True
    state = _as_the_network_names_them(without_wrapper_prefixes(state, weights), model.backbone)
    new: list[str] = []
    if embedding_dim:
        # Weight and bias of the new last layer stay random, the only ones whose shape follows from the outputs.
        own = model.backbone.state_dict()
        new = [key for key in own if key in state and _differs_in_outputs(state[key], own[key], embedding_dim)]
        if len(new) <= 2:
            state |= {key: own[key] for key in new}
    load_strictly(model.backbone, state, weights)
    return not new


def load_strictly(module: nn.Module, state: dict[str, Any], source: str) -> None:
    """module.load_state_dict with one-line errors that name what does not fit.

    Weights of another floating-point type are converted, which is said on stderr.

    Raises:
        CheckpointError: missing or unexpected keys, other shapes or kinds of number, or values that are no finite
            dense tensors, also after the conversion.
    """
    require_fit(module, state, source)
    own = module.state_dict()
    converted = [key for key in own if state[key].dtype != own[key].dtype]
    if converted:
        first = f"{converted[0]} from {state[converted[0]].dtype} to {own[converted[0]].dtype}"
        print(one_line(f"{source}: converting {len(converted)} weights ({first}, ...)"), file=sys.stderr)
        state = state | {key: state[key].to(own[key].dtype) for key in converted}
        require_finite(state, source)  # what fits into float64 may be infinite in float32
    module.load_state_dict(state)


def require_fit(module: nn.Module, state: dict[str, Any], source: str) -> None:
    """Whether `state` can be loaded into `module`, which may be one on PyTorch's meta device.

    Raises:
        CheckpointError: as `load_strictly`.
    """
    require_finite(state, source)
    own = module.state_dict()
    differing = {
        "missing": [key for key in own if key not in state],
        "unexpected": [str(key) for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "of another kind": [
            f"{key} {state[key].dtype} instead of {own[key].dtype}"
            for key in own
            if key in state and state[key].is_floating_point() != own[key].is_floating_point()
        ],
    }
    if any(differing.values()):
        lists = (f"{len(keys)} {what}: {_first(keys)}" for what, keys in differing.items() if keys)
        raise CheckpointError(f"{source}: weights of another network; {'; '.join(lists)}", code="other-network")


def require_finite(state: dict[str, Any], source: str) -> None:
    """Raises:
    CheckpointError: a value is no dense tensor, or not finite.
    """
    for key, value in state.items():
        if not _is_dense(value):
            found = f"{value.dtype} {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"{source}: {key}: expected a dense tensor, got {found}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{source}: {key} holds NaN or infinity; take an earlier checkpoint of the run", code="not-finite"
            )


def _is_dense(value: object) -> bool:
    """Whether it is a tensor of floats or whole numbers that are all there."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
        return False
    if value.is_quantized or value.is_complex() or (value.is_floating_point() and value.dtype not in _FLOATS):
        return False
    return value.nbytes <= value.untyped_storage().nbytes()  # else one number may stand for a trillion


def without_wrapper_prefixes(state: dict[str, Any], source: str) -> dict[str, Any]:
    """The names as the network itself has them; what was left out is said on stderr."""
    for prefix in _WRAPPER_PREFIXES:
        if state and all(str(key).startswith(prefix) for key in state):
            print(one_line(f"{source}: leaving out the prefix {prefix!r} of its weights' names"), file=sys.stderr)
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _first(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


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
                f"{url} at {file}, or train from random weights with --weights none",
                code="weights-missing",
            ) from error
    elif not hashlib.sha256(file.read_bytes()).hexdigest().startswith(_hash_prefix(file)):
        raise CheckpointError(f"{file}: damaged (its SHA-256 does not begin with its name's); place {url} there again")
    return load_safely(file, file.read_bytes())


def _differs_in_outputs(value: object, own: torch.Tensor, outputs: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == own.ndim > 0
        and value.shape[1:] == own.shape[1:]
        and len(own) == outputs != len(value)
    )


def _hash_prefix(file: Path) -> str:
    """torchvision names its files <network>-<first digits of the SHA-256>.pth."""
    return file.stem.rpartition("-")[2]


def _as_the_network_names_them(state: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Weights of torchvision, some of whose files are older than its networks."""
    # GoogLeNet's and Inception's extra classifiers are of use in training only.
    state = {key: value for key, value in state.items() if not str(key).startswith(("aux1.", "aux2.", "AuxLogits."))}
    # DenseNet's layers were once called norm.1 and conv.2.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", str(key)): state[key] for key in state}
    # BatchNorm did not always count its batches, and the count has no effect.
    counts = [key for key in network.state_dict() if key.endswith(".num_batches_tracked") and key not in state]
    return state | {key: torch.tensor(0) for key in counts}


def load_safely(path: Path, data: bytes) -> dict[str, Any]:
    """torch.load(weights_only=True) of a dictionary, onto the CPU; `data` are the bytes of the file `path`.

    torch.save writes a zip file and torch.load does not look at its checksums, so a weight with a flipped bit would be
    read as another weight; they are checked here. It also unpacks compressed records, which torch.save never writes,
    whatever memory that takes; those are refused.

    Raises:
        CheckpointError: not a file of torch.save, damaged, or one that holds more than plain data.
    """
    try:
        _check_sums(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # pickle, zip, storage and attribute errors of many kinds
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: is no checkpoint (expected a dictionary, got {type(content).__name__})", code="not-a-checkpoint"
        )
    return content


def _check_sums(data: bytes) -> None:
    """Raises:
    ValueError, zipfile.BadZipFile: a record of the zip file does not match its checksum, or all are more than the file.
    """
    if zipfile.is_zipfile(io.BytesIO(data)):  # before PyTorch 1.6 it was none, and had no checksums
        with zipfile.ZipFile(io.BytesIO(data)) as records:
            if sum(record.file_size for record in records.infolist()) > len(data):
                raise ValueError("its records are larger than the file")
            if damaged := records.testzip():
                raise ValueError(f"{damaged} does not match its checksum")
