"""Checkpoints and weight files: damaged ones, and ones that somebody has thought about."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz.driver import Target
from fuzz.mutations import VALUES, flipped, mutated, mutated_json
from torch import nn
from torchvision.models import list_models
from torchvision.models._api import register_model

import siamese_train.weights
from siamese_deploy.errors import SiameseError
from siamese_train.checkpoint import read_checkpoint
from siamese_train.model import SiameseNetwork
from siamese_train.weights import load_initial_weights

IMAGE_SIZE = 16
_CODE = (
    (b"posix", b"system", b"touch "), (b"os", b"system", b"touch "), (b"subprocess", b"getoutput", b"touch "),
    (b"builtins", b"eval", b"open|"), (b"builtins", b"exec", b"open|"), (b"__builtin__", b"eval", b"open|"),
    (b"torch._utils", b"__builtins__", b"x"), (b"torch.hub", b"load", b"x"), (b"runpy", b"run_path", b"x"),
    (b"torch.storage", b"io.open", b"x"), (b"torch.serialization", b"os.system", b"touch "),
    (b"torch", b"load", b"x"), (b"pathlib", b"Path.touch", b""), (b"_codecs", b"encode", b"x"),
)  # fmt: skip


class _Net(nn.Sequential):
    """The smallest network with all that networks have; 32 numbers, so that files are small and reading is quick."""

    def __init__(self, weights: object = None, num_classes: int = 4) -> None:
        super().__init__(
            nn.Conv2d(3, 2, 3, stride=8), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.append(nn.Linear(2, num_classes))


_Net.__module__ = "torchvision.models.fuzz_net"


class _Checkpoints(Target):
    memory_mib = 1536
    seconds = 5.0

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        if "fuzz_net" not in list_models():  # two targets share a process
            register_model("fuzz_net")(_Net)
        torch.manual_seed(0)
        self.file, self.canary = folder / "a.pth", folder / "canary"
        model = SiameseNetwork("fuzz_net", IMAGE_SIZE)
        optimizer = torch.optim.Adam(model.parameters())
        self.content = {
            "epoch": 3,
            "model_state_dict": model.state_dict(),
            "backbone": "fuzz_net",
            "optimizer_state_dict": optimizer.state_dict(),
            "siamese_toolkit": {
                "format": 1,
                "config": {"image_size": IMAGE_SIZE, "embedding_dim": 0, "backbone": "fuzz_net"},
                "data": {"train_images": 16},
                "metrics": {"val_loss": 0.5},
                "progress": {"epoch": 3, "step": 0},
            },
        }
        self.whole = _saved(self.content)

    def _read(self) -> str:
        try:
            checkpoint = read_checkpoint(self.file)
            model = checkpoint.build_model()
        except SiameseError as error:
            return type(error).__name__
        self._expect_same(checkpoint, model)
        return "builds"

    def _expect_same(self, checkpoint: Any, model: nn.Module) -> None:
        pass

    def _initial_weights(self) -> str:
        dim = 5 * (self.file.stat().st_size % 2)
        try:
            load_initial_weights(SiameseNetwork("fuzz_net", IMAGE_SIZE, dim), "fuzz_net", str(self.file), dim)
        except SiameseError as error:
            return type(error).__name__
        return "loads"

    def check(self, data: bytes) -> str:
        self.file.write_bytes(data)
        outcome = f"{self._read()}, as --weights {self._initial_weights()}"
        assert not self.canary.exists(), "code from the file ran"
        return outcome


class CheckpointBytes(_Checkpoints):
    """Bits flipped, ends cut off, pieces mixed: an error of ours, or exactly the same network."""

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        kind = random.randint(4)
        if kind == 0:  # the first and last kilobytes hold the structure
            at = random.randint(8 * 4096)
            return flipped(self.whole, at if random.randint(2) else 8 * len(self.whole) - 1 - at)
        if kind == 1:
            return flipped(self.whole, random.randint(8 * len(self.whole)))
        if kind == 2:
            return self.whole[: random.randint(len(self.whole))]
        return mutated(random, self.whole, [self.whole])

    def _expect_same(self, checkpoint: Any, model: nn.Module) -> None:
        assert (checkpoint.epoch, checkpoint.backbone, checkpoint.image_size) == (3, "fuzz_net", IMAGE_SIZE)
        assert checkpoint.training == self.content["siamese_toolkit"]
        for key, value in model.state_dict().items():
            assert torch.equal(value, self.content["model_state_dict"][key]), f"{key} is not what was saved"

    def sabotage(self) -> None:
        """Nobody looks at the checksums."""
        siamese_train.weights._check_sums = lambda data: None


class CheckpointContents(_Checkpoints):
    """Files that PyTorch could have written, of any content, and pickles that it would not: no code of theirs runs."""

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        kind = random.randint(10)
        if kind == 0:
            return _with_code(random, self.whole, self.canary)
        if kind == 1:
            records = _records(self.whole)
            name = next(name for name in records if name.endswith("data.pkl"))
            records[name] = mutated(random, records[name], list(records.values()), most=3)
            return _zip(records)
        if kind == 2:
            return _strange_zip(random, self.whole)
        content = dict(self.content)
        if kind == 3:  # the older format, which is no zip file
            EDITS[random.randint(len(EDITS))](random, content)
            data = self._file(content, _use_new_zipfile_serialization=False)
            return mutated(random, data) if random.randint(2) else data
        for _ in range(random.randint(1, 3)):
            EDITS[random.randint(len(EDITS))](random, content)
        value: Any = content
        if random.randint(4) == 0:
            value = (content["model_state_dict"], list(content.values()), None, {0: content})[random.randint(4)]
        return self._file(value)

    def _file(self, value: Any, **options: Any) -> bytes:
        try:
            return _saved(value, **options)
        except Exception:  # what PyTorch itself cannot save comes in no file of its own
            return self.whole

    def sabotage(self) -> None:
        """PyTorch may load anything."""
        really_load = torch.load
        torch.load = lambda file, **options: really_load(file, **(options | {"weights_only": False}))


def _saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as records:
        return {name: records.read(name) for name in records.namelist()}


def _zip(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in records.items():
            made.writestr(name, data)
    return file.getvalue()


def _with_code(random: np.random.RandomState, whole: bytes, canary: Path) -> bytes:
    """A pickle that asks for a function to be called, in either format."""
    module, name, argument = _CODE[random.randint(len(_CODE))]
    if argument == b"open|":
        argument = f"open({str(canary)!r}, 'w')".replace("'", '"').encode()
    else:
        argument += str(canary).encode()
    if random.randint(2):
        pickled = b"\x80\x02c" + module + b"\n" + name + b"\n(S'" + argument + b"'\ntR."
    else:  # protocol 4, by the stack
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
        pickled = b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(argument)]) + argument + b"\x85R."
    if random.randint(3) == 0:
        return pickled
    records = _records(whole)
    key = next(key for key in records if key.endswith("data.pkl"))
    inside = records[key]
    # Alone, or pushed and dropped before the harmless rest.
    records[key] = pickled if random.randint(2) else pickled[:-1] + b"0" + inside[2:]
    return _zip(records)


def _strange_zip(random: np.random.RandomState, whole: bytes) -> bytes:
    records = _records(whole)
    names = list(records)
    kind = random.randint(6)
    if kind == 0:  # a bomb
        records[names[random.randint(len(names))]] = b"\0" * (1 << int(random.randint(20, 29)))
        return _zip(records, zipfile.ZIP_DEFLATED)
    if kind == 1:
        return _zip(records, (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[random.randint(3)])
    if kind == 2:
        del records[names[random.randint(len(names))]]
    elif kind == 3:
        name = names[random.randint(len(names))]
        records[("../" + name, "/etc/x", name + "\0x", "x/" + name)[random.randint(4)]] = records.pop(name)
    elif kind == 4:
        name = names[random.randint(len(names))]
        records[name] = mutated(random, records[name], list(records.values()))
    else:  # sizes that the directory claims
        data = bytearray(_zip(records))
        at = data.rfind(b"PK\1\2")
        struct.pack_into("<L", data, at + (20, 24, 42)[random.randint(3)], (0, 2**31, 2**32 - 1)[random.randint(3)])
        return bytes(data)
    return _zip(records)


# One edit each of the dictionary that is saved.


def _state(content: dict[str, Any]) -> dict[Any, Any]:
    state = content.get("model_state_dict")
    content["model_state_dict"] = state = OrderedDict(state) if isinstance(state, dict) else OrderedDict()
    if not state:
        state["backbone.0.bias"] = torch.zeros(2)
    return state


def _strange_values(random: np.random.RandomState, like: Any) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: VALUES[random.randint(len(VALUES))],
        lambda: torch.tensor([1.0, float("nan")]),
        lambda: torch.zeros(()),
        lambda: torch.zeros(0),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(2, 2, device="meta"),
        lambda: torch.zeros(2**40, device="meta"),
        lambda: torch.zeros(2, 2).to_sparse(),
        lambda: torch.zeros(2, 2).to_sparse_csr(),
        lambda: torch.sparse_coo_tensor(
            torch.tensor([[10**6, 5]]), torch.ones(2), (2,), check_invariants=False, is_coalesced=True
        ),
        lambda: torch.quantize_per_tensor(torch.zeros(2, 2), 0.1, 0, torch.quint8),
        lambda: torch.quantize_per_channel(torch.zeros(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        lambda: torch.zeros(2, dtype=torch.complex64).conj(),
        lambda: torch._neg_view(torch.zeros(2)),
        lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
        lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
        lambda: nn.Parameter(torch.zeros(2)),
        lambda: torch.zeros(2).storage(),
        lambda: torch.Size([2, 2]),
        lambda: torch.device("cuda:7"),
        lambda: torch.float32,
        lambda: {"a", 1},
        lambda: b"bytes",
        lambda: 1 + 2j,
        lambda: np.float64(1.5),
        lambda: np.zeros(3),
        lambda: OrderedDict(),
        lambda: np.float64("nan"),
    )
    return makers[random.randint(len(makers))]()


_DTYPES = sorted((value for value in vars(torch).values() if isinstance(value, torch.dtype)), key=str)


def _field(random: np.random.RandomState, content: dict[str, Any]) -> None:
    keys = [*content, "new", 0, None]
    key = keys[random.randint(len(keys))]
    if random.randint(4):
        content[key] = _strange_values(random, None)
    else:
        content.pop(key, None)


def _weight(random: np.random.RandomState, content: dict[str, Any]) -> None:
    state = _state(content)
    key = list(state)[random.randint(len(state))]
    value = state[key] if isinstance(state[key], torch.Tensor) else torch.zeros(2)
    kind = random.randint(7)
    if kind == 0:
        del state[key]
    elif kind <= 2:
        state[key] = _strange_values(random, value)
    elif kind == 3:
        dtype = _DTYPES[random.randint(len(_DTYPES))]
        try:
            state[key] = value.to(dtype)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            state[key] = torch.empty(value.shape, dtype=dtype)
    elif kind == 4:
        state[key] = (
            value.new_zeros((*value.shape, 1)) if random.randint(2) else value[None].expand(2**20, *value.shape)
        )
    elif kind == 5:
        state[key] = torch.full(
            tuple(value.shape), (float("nan"), float("inf"), 1e300)[random.randint(3)], dtype=torch.float64
        )
    else:
        state[("module.", "x", "_orig_mod.", "backbone.", "")[random.randint(5)] + str(key)] = state.pop(key)


def _names(random: np.random.RandomState, content: dict[str, Any]) -> None:
    state = _state(content)
    kind = random.randint(4)
    if kind <= 1:
        prefix = ("module.", "_orig_mod.", "backbone.", "module._orig_mod.")[random.randint(4)]
        content["model_state_dict"] = OrderedDict((prefix + str(key), value) for key, value in state.items())
    else:
        state[(0, None, (1, 2), b"module.", 1.5, "\ud800", "x" * 10**5, True, "")[random.randint(9)]] = torch.zeros(2)


def _backbone(random: np.random.RandomState, content: dict[str, Any]) -> None:
    names = (
        "squeezenet1_1",
        "shufflenet_v2_x0_5",
        "fuzz_net\0",
        "",
        "x" * 10**5,
        "raft_large",
        "../a",
        "\ud800\x1b[2J",
    )
    content["backbone"] = names[random.randint(len(names))]


def _settings(random: np.random.RandomState, content: dict[str, Any]) -> None:
    own = mutated_json(random, content.get("siamese_toolkit", {}))
    if isinstance(own, dict) and random.randint(2):
        config = own.setdefault("config", {})
        if isinstance(config, dict):
            sizes = (0, -1, 1, 2, 16, 224, 4096, 65_536, 2**40, True, 16.0, float("nan"))
            name = ("image_size", "embedding_dim")[random.randint(2)]
            config[name] = sizes[random.randint(len(sizes))]
    if isinstance(own, dict) and random.randint(4) == 0:
        keys = list(own) or ["format"]
        own[keys[random.randint(len(keys))]] = _strange_values(random, None)
    content["siamese_toolkit"] = own


EDITS: tuple[Callable[[np.random.RandomState, dict[str, Any]], None], ...] = (
    _field, _weight, _weight, _weight, _names, _backbone, _settings, _settings,
)  # fmt: skip
