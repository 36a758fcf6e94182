"""Checkpoint -> Bundle: build, prove, publish."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from siamese_deploy.bundle import Bundle, Golden, Manifest, golden_image
from siamese_deploy.demo_data import draw_character
from siamese_deploy.durable_files import refuse_existing
from siamese_deploy.errors import EnvironmentFault, ImageError, InputDataError, UsageError
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.preprocess import Preprocess, load_image, resize_image
from siamese_deploy.runtime import OnnxVerifier
from siamese_deploy.verifier import Images
from siamese_export.accuracy import Accuracy, measure_accuracy
from siamese_export.graphs import backbone_graph, head_graph
from siamese_export.parity import BATCH_SIZES, Parity, measure_parity, require_parity
from siamese_train.checkpoint import Checkpoint, read_checkpoint
from siamese_train.torch_verifier import TorchVerifier

MIN_ONNXRUNTIME = (1, 30)
PARITY_PICTURES = 2 * max(BATCH_SIZES)
BATCH_RANGE = (1, 16, 64)
DEFAULT_THRESHOLD = 0.5
"""The reference scripts' decision."""
_TOOLS = ("siamese-toolkit", "torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")


@dataclass(frozen=True)
class Exported:
    bundle: Bundle
    parity: Parity
    accuracy: Accuracy | None
    """None without validation pictures."""


def export_checkpoint(
    checkpoint_path: Path, target: Path, val_path: Path | None = None, *, target_far: float | None = None
) -> Exported:
    """Export a checkpoint as the new bundle folder `target`.

    Args:
        val_path: folder of pictures to measure parity and accuracy on; without one, parity is measured on made-up
            characters and the threshold is DEFAULT_THRESHOLD.
        target_far: false accept rate that the threshold is for, in (0, 1); None: 0.001 where `val_path` has pairs
            enough to tell, else the threshold is DEFAULT_THRESHOLD.

    Raises:
        UsageError: `target` exists, or its parent folder does not; `target_far` out of range or without `val_path`.
        EnvironmentFault: the installed ONNX Runtime is too old to prove an export with.
        InputDataError: no checkpoint; no readable picture in `val_path`; too few of them for `target_far`.
        CheckpointError: not a checkpoint, damaged, or of another network.
        ParityError: the graphs do not answer like the network; nothing is written.
    """
    if target_far is not None and not (val_path and 0 < target_far < 1):
        raise UsageError(f"--target_far: expected a rate between 0 and 1, together with --val_path, got {target_far}")
    refuse_existing(target)
    _require_recent_onnxruntime()
    checkpoint = read_checkpoint(checkpoint_path)
    reference = TorchVerifier.from_checkpoint(checkpoint, torch.device("cpu"))
    images, source = _parity_pictures(val_path, reference.preprocess)

    bundle = _build(checkpoint, reference)
    # On the CPU, as PyTorch; the golden check repeats the proof on whatever provider opens the bundle later.
    verifier = OnnxVerifier(bundle, provider="cpu")
    parity = measure_parity(reference, verifier, images, source)
    require_parity(parity)
    bundle.manifest.about["parity"] = parity.to_json()
    accuracy = measure_accuracy(verifier, val_path, target_far) if val_path else None
    if accuracy:
        bundle.manifest.about["accuracy"] = accuracy.to_json()
    if accuracy and accuracy.operating_point:
        point = accuracy.operating_point
        manifest = replace(bundle.manifest, threshold=point.threshold, threshold_origin=accuracy.origin_of(point))
        bundle = replace(bundle, manifest=manifest)
    bundle.write(target)
    return Exported(bundle, parity, accuracy)


def _require_recent_onnxruntime() -> None:
    """The proof is worth what the runtime that gives it is worth: a bundle runs on older ones, an export does not."""
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        raise EnvironmentFault(
            f"ONNX Runtime {version} is installed, export needs {'.'.join(map(str, MIN_ONNXRUNTIME))} or newer; "
            "run: pip install --upgrade onnxruntime"
        )


def _build(checkpoint: Checkpoint, reference: TorchVerifier) -> Bundle:
    preprocess = reference.preprocess
    embedding = reference.embed(golden_image(preprocess.size_hw)[None])
    manifest = Manifest(
        backbone=checkpoint.backbone,
        embedding_dim=reference.model.embedding_dim,
        preprocess=preprocess,
        precision="fp32",
        batch=BATCH_RANGE,
        threshold=DEFAULT_THRESHOLD,
        threshold_origin="default: the reference scripts' 0.5, not chosen on data",
        golden=Golden(embedding[0], float(reference.score(embedding, embedding)[0])),
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        about={
            "checkpoint": {"sha256": checkpoint.sha256, "epoch": checkpoint.epoch},
            "training": {
                key: checkpoint.training[key] for key in ("data", "metrics", "validation") if key in checkpoint.training
            },
            "tools": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
            | {name: metadata.version(name) for name in _TOOLS},
        },
    )
    return Bundle(manifest, backbone_graph(reference.model, preprocess.size_hw), head_graph(reference.model))


def _parity_pictures(val_path: Path | None, preprocess: Preprocess) -> tuple[Images, str]:
    """At least max(BATCH_SIZES) pictures (N, H, W, 3) uint8, and where they came from."""
    if val_path is None:
        drawn = [draw_character(seed=k, variation=k) for k in range(PARITY_PICTURES)]
        return np.stack([resize_image(image, preprocess.size_hw) for image in drawn]), "drawn characters"
    pictures = list(_readable(val_path, preprocess))
    if not pictures:
        raise InputDataError(f"{val_path}: none of the pictures tried can be read")
    # A small folder is repeated, so that every batch size is measured.
    repeated = [pictures[i % len(pictures)] for i in range(PARITY_PICTURES)]
    return np.stack(repeated), f"{len(pictures)} of {val_path.name}"


def _readable(val_path: Path, preprocess: Preprocess) -> Iterator[Images]:
    folder = scan_image_folder(val_path)
    # Spread evenly over the folder, so that many classes are seen.
    for image in np.unique(np.linspace(0, len(folder) - 1, PARITY_PICTURES).astype(int)).tolist():
        try:
            yield load_image(folder.absolute_path(image), preprocess)
        except ImageError:
            continue
