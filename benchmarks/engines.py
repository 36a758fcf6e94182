"""What network.py compares: one trained network, its bundles and real pictures, and the ways to run its backbone.

A way is a function from (N, H, W, 3) uint8 RGB to (N, dim) float32: pre-processing to floats is inside, as in a bundle.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from runtime import make_bundle
from training import omniglot

from siamese_deploy import OnnxVerifier
from siamese_deploy.demo_data import write_demo_data
from siamese_deploy.embedding import ImageEmbeddings
from siamese_deploy.evaluate import evaluate_embedded
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.pairs import every_pair
from siamese_deploy.preprocess import load_image
from siamese_deploy.providers import import_onnxruntime, usable_cores
from siamese_train.checkpoint import read_checkpoint
from siamese_train.model import InputNormalisation, SiameseNetwork

Embed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Subject:
    network: SiameseNetwork
    """In inference mode."""
    bundles: dict[str, Path]
    """By precision: fp32, int8."""
    folder: ImageFolder
    images: np.ndarray
    """(N, H, W, 3) uint8, the first N of the folder."""
    is_trained: bool

    @cached_property
    def verifiers(self) -> dict[str, OnnxVerifier]:
        return {precision: OnnxVerifier(bundle, provider="cpu") for precision, bundle in self.bundles.items()}

    @cached_property
    def reference(self) -> np.ndarray:
        """PyTorch's embeddings, (N, dim) float32."""
        return embed_all(torch_ways(self.network)["PyTorch eager"], self.images, 16)

    def roc_auc(self, vectors: np.ndarray) -> float:
        """Of every pair of the pictures, scored with the float32 head."""
        row_of_image = np.full(len(self.folder), -1)
        row_of_image[: len(vectors)] = np.arange(len(vectors))
        embeddings = ImageEmbeddings(vectors, row_of_image, ())
        evaluation = evaluate_embedded(self.verifiers["fp32"], self.folder, every_pair(self.folder), embeddings)
        assert evaluation.metrics.roc_auc is not None
        return evaluation.metrics.roc_auc


def make_subject(checkpoint: Path | None, folder: Path, n_pictures: int) -> Subject:
    """Omniglot's validation pictures, or drawn ones; `checkpoint`, or an untrained resnet18 of 224 px."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/xdg"
    try:
        data = omniglot()
    except SystemExit as reason:
        print(f"{reason}; drawn pictures instead")
        data = folder / "drawn"
        write_demo_data(data, train_classes=20, val_classes=65, drawings=12)
    bundles = {precision: folder / precision for precision in ("fp32", "int8")}
    if checkpoint is None:
        bundles["fp32"] = make_bundle(folder)
    else:
        export(checkpoint, bundles["fp32"])
    int8 = ["--precision", "int8", "--target", "cpu", "--calibration", data / "train", "--val_path", data / "val"]
    if checkpoint is None:  # what 8 bits cost a network that cannot tell anything is no reason to refuse them
        int8 += ["--max_auc_drop", "1", "--max_tar_drop", "1", "--max_far_growth", "1e9"]
    export(checkpoint or folder / "best.pth", bundles["int8"], *int8)
    pictures = scan_image_folder(data / "val")
    read = read_checkpoint(checkpoint or folder / "best.pth")
    preprocess = OnnxVerifier(bundles["fp32"], provider="cpu").preprocess
    n_pictures = min(n_pictures, len(pictures))
    images = np.stack([load_image(pictures.absolute_path(k), preprocess) for k in range(n_pictures)])
    height, width = preprocess.size_hw
    print(
        f"{read.backbone} of {width} x {height} px, {'trained' if checkpoint else 'untrained'}; "
        f"{n_pictures} pictures of {'drawn characters' if data == folder / 'drawn' else 'Omniglot'}"
    )
    return Subject(read.build_model().eval(), bundles, pictures, images, checkpoint is not None)


def export(checkpoint: Path, bundle: Path, *options: str | Path) -> None:
    command = [Path(sys.executable).with_name("siamese-export"), "-c", checkpoint, "-o", bundle, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def embed_all(embed: Embed, images: np.ndarray, batch: int) -> np.ndarray:
    """Batches of one size only, since some engines prepare themselves for each; the last is filled up."""
    parts = [
        embed(images.take(range(first, first + batch), axis=0, mode="wrap")) for first in range(0, len(images), batch)
    ]
    return np.concatenate(parts)[: len(images)]


def largest_difference(vectors: np.ndarray, expected: np.ndarray) -> float:
    """Largest norm of a row's difference, relative to the expected row's."""
    return float((np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


class ChannelsLast(torch.nn.Module):
    """`InputNormalisation` and the backbone without a change of layout: pictures come channels-last."""

    def __init__(self, network: SiameseNetwork) -> None:
        super().__init__()
        self.normalise = InputNormalisation()
        self.backbone = copy.deepcopy(network.backbone).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        embeddings: torch.Tensor = self.backbone(pixels * self.normalise.scale + self.normalise.shift)
        return embeddings


def torch_ways(network: SiameseNetwork) -> dict[str, Embed]:
    def embedding_with(run: Callable[[torch.Tensor], torch.Tensor]) -> Embed:
        @torch.no_grad()
        def embed(images: np.ndarray) -> np.ndarray:
            return run(torch.from_numpy(images)).float().numpy()

        return embed

    def in_bf16(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            embeddings: torch.Tensor = channels_last(images)
        return embeddings

    channels_last = ChannelsLast(network).eval()
    # Frozen: weights are constants, laid out for the kernels and joined with BatchNorm, as both other engines do.
    compiled = torch.compile(channels_last, dynamic=False, options={"freezing": True})
    return {
        "PyTorch eager": embedding_with(torch.nn.Sequential(InputNormalisation(), network.backbone).eval()),
        "PyTorch eager, channels-last": embedding_with(channels_last),
        "torch.compile, channels-last, frozen": embedding_with(compiled),
        "PyTorch eager, channels-last, bf16": embedding_with(in_bf16),
    }


def openvino_way(bundle: Path, **settings: Any) -> Embed:
    """backbone.onnx as it is, compiled for each batch size: a fixed shape is what suits OpenVINO best."""
    core = openvino.Core()
    compiled: dict[int, Any] = {}

    def embed(images: np.ndarray) -> np.ndarray:
        if len(images) not in compiled:
            model = core.read_model(bundle / "backbone.onnx")
            model.reshape({"images": list(images.shape)})
            compiled[len(images)] = core.compile_model(model, "CPU", settings)
        embeddings: np.ndarray = compiled[len(images)](images)[0]
        return embeddings

    return embed


def openvino_choice() -> str:
    """The precision it computes a float32 graph in on this CPU where nothing is asked for: f32, bf16 or f16."""
    return str(openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string())


def session_way(bundle: Path, *, level: str = "ORT_ENABLE_ALL", **config: str) -> Embed:
    """ONNX Runtime with settings other than ours; `config` in its own names, "." written "__"."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_cores()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    for key, value in config.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = ort.InferenceSession(bundle / "backbone.onnx", options, providers=["CPUExecutionProvider"])

    def embed(images: np.ndarray) -> np.ndarray:
        embeddings: np.ndarray = session.run(None, {"images": images})[0]
        return embeddings

    return embed
