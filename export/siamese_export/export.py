"""Checkpoint -> Bundle: build, prove, publish."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from siamese_deploy.bundle import (
    BACKBONE,
    EMBEDDINGS,
    HEAD,
    IMAGES,
    LEFT,
    MAX_GRAPH_BYTES,
    RIGHT,
    SCORES,
    Bundle,
    Golden,
    Manifest,
    golden_image,
    refuse_target,
)
from siamese_deploy.demo_data import draw_character
from siamese_deploy.errors import (
    CheckpointError,
    EnvironmentFault,
    ImageError,
    InputDataError,
    ParityError,
    UsageError,
)
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.preprocess import Preprocess, load_image, resize_image
from siamese_deploy.providers import open_session, run_session
from siamese_deploy.runtime import OnnxVerifier
from siamese_deploy.signature import SigningKey
from siamese_deploy.verifier import Images
from siamese_export.accuracy import (
    DEFAULT_TARGET_FAR,
    Accuracy,
    Limits,
    cost_of_precision,
    measure_accuracy,
    validation_folder,
)
from siamese_export.graphs import backbone_model, head_model, serialized
from siamese_export.parity import BATCH_SIZES, Parity, measure_parity, require_parity
from siamese_export.precision import (
    calibration_images,
    eight_bits,
    half_precision,
    require_range_of_half,
    speed_ratio,
)
from siamese_train.checkpoint import Checkpoint, read_checkpoint
from siamese_train.torch_verifier import TorchVerifier

MIN_ONNXRUNTIME = (1, 30)
PARITY_PICTURES = 2 * max(BATCH_SIZES)
BATCH_RANGE = (1, 16, 64)
DEFAULT_THRESHOLD = 0.5
"""The reference scripts' decision."""
CALIBRATION_IMAGES = 256
LEAST_FAR = 1e-9
_TOOLS = ("siamese-toolkit", "torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy", "pillow")


@dataclass(frozen=True)
class Calibration:
    """Where int8 takes the range of each value from."""

    path: Path
    """Folder of pictures that the network was trained on."""
    images: int = CALIBRATION_IMAGES
    """Pictures to draw, at most."""
    seed: int = 1


@dataclass(frozen=True)
class Exported:
    bundle: Bundle
    parity: Parity
    accuracy: Accuracy | None
    """None without validation pictures."""
    speed: float | None
    """Pictures a second of the backbone in int8-cpu, in multiples of fp32's, on this CPU; None in other precisions."""


def export_checkpoint(
    checkpoint_path: Path,
    target: Path,
    val_path: Path | None = None,
    *,
    precision: str = "fp32",
    calibration: Calibration | None = None,
    target_far: float | None = None,
    limits: Limits | None = None,
    replace: bool = False,
    key: SigningKey | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Export a checkpoint as the bundle folder `target`.

    Args:
        val_path: folder of pictures to measure parity and accuracy on; without one, parity is measured on made-up
            characters and the threshold is DEFAULT_THRESHOLD.
        precision: of siamese_deploy.bundle.PRECISIONS; below fp32, `val_path` has to show what it costs.
        calibration: for int8, and only for it.
        target_far: false accept rate that the threshold is for, in [LEAST_FAR, 1); None: 0.001 where `val_path` has
            pairs enough to tell, else the threshold is DEFAULT_THRESHOLD. Below fp32 there have to be enough.
        limits: what a precision below fp32 may cost.
        replace: `target` may be a bundle already; it stays until the new one is complete.
        key: signs the bundle.
        say: is told what is being done, and what the user should know.

    Raises:
        UsageError: options that do not go together; `target` exists and is not to be replaced, or no bundle; its
            parent folder does not exist.
        EnvironmentFault: the installed ONNX Runtime is too old to prove an export with.
        InputDataError: no checkpoint; no readable picture in `val_path`; too few of them for the false accept rate.
        CheckpointError: not a checkpoint, damaged, of another network, or of one too large for a file of float32.
        ParityError: the graphs do not answer like the network, or fp16 cannot hold its values; nothing is written.
        AccuracyError: the precision costs more than `limits`; nothing is written.
    """
    target_far = _checked_target_far(precision, val_path, calibration, target_far)
    refuse_target(target, replace=replace)
    _require_recent_onnxruntime()
    val_folder = validation_folder(val_path, target_far) if val_path else None
    calibration_folder = scan_image_folder(calibration.path) if calibration else None
    checkpoint = read_checkpoint(checkpoint_path)
    fits_in_float32 = _refuse_too_large(checkpoint, precision)
    reference = TorchVerifier.from_checkpoint(checkpoint, torch.device("cpu"))
    checkpoint = replace_fields(checkpoint, model_state={}, optimizer_state={})  # the largest take 2.5 GB a copy
    images, source = _parity_pictures(val_folder, reference.preprocess)
    about = _about(checkpoint)

    say(f"exporting {checkpoint.backbone}")
    backbone = backbone_model(reference.model, reference.preprocess.size_hw)
    head = head_model(reference.model)
    if fits_in_float32:
        # Whatever is published comes from this graph, so it is proven first.
        bundle = _bundle(checkpoint, reference, backbone, head, "fp32")
        # On the CPU, as PyTorch; the golden check repeats the proof on whatever provider opens the bundle later.
        float32 = verifier = OnnxVerifier(bundle, provider="cpu")
        say("comparing fp32 with PyTorch")
        parity = measure_parity(reference, verifier, images, source=source)
        require_parity(parity)
    if precision != "fp32":
        say(f"making {precision} of it")
        if precision == "fp16":
            require_range_of_half(reference, images)
        if calibration and calibration_folder:
            shown, digests = calibration_images(
                calibration_folder, reference.preprocess, calibration.images, calibration.seed
            )
            about["calibration"] = {
                "source": calibration.path.name, "pictures": len(shown), "seed": calibration.seed,
                "data_digest": calibration_folder.digest(),
            }  # fmt: skip
            if len(shown) < calibration.images:
                say(f"warning: {calibration.path} gives {len(shown)} of {calibration.images} pictures to calibrate on")
            if val_folder and (overlap := _count_of(digests, val_folder)):
                say(
                    f"warning: {overlap} files of {val_folder.root} are among those calibrated on, so they show int8 "
                    "better than it is"
                )
            lowered = eight_bits(backbone, shown, tensorrt=precision == "int8-tensorrt")
        else:
            lowered = half_precision(backbone)
        bundle = _bundle(checkpoint, reference, lowered, head, precision)
        del backbone, lowered
        verifier = OnnxVerifier(bundle, provider="cpu")
        say(f"comparing {precision} with PyTorch")
        parity = measure_parity(reference, verifier, images, source=source, precision=precision)
        require_parity(parity)
    about["parity"] = parity.to_json()

    accuracy = speed = None
    if val_folder:
        say(f"scoring every pair of {val_folder.root}")
        accuracy = measure_accuracy(verifier, val_folder, target_far)
        about["accuracy"] = accuracy.to_json()
        if precision != "fp32":
            say("scoring them with PyTorch in fp32")
            float32_accuracy = measure_accuracy(reference, val_folder, target_far)
            cost = cost_of_precision(precision, float32_accuracy, accuracy, limits or Limits())
            about["cost_of_precision"] = cost.to_json()
            for line in cost.table():
                say(line)
            cost.require()
        if precision == "int8-cpu":
            speed = round(speed_ratio(float32, verifier, images), 2)
            about["speed_over_fp32"] = speed
    manifest = replace_fields(bundle.manifest, about=bundle.manifest.about | about)
    if accuracy and (point := accuracy.operating_point):
        manifest = replace_fields(manifest, threshold=point.threshold, threshold_origin=accuracy.origin_of(point))
    bundle = replace_fields(bundle, manifest=manifest)
    bundle.write(target, replace=replace, key=key)
    return Exported(bundle, parity, accuracy, speed)


def _checked_target_far(
    precision: str, val_path: Path | None, calibration: Calibration | None, target_far: float | None
) -> float | None:
    if target_far is not None and not (val_path and LEAST_FAR <= target_far < 1):
        raise UsageError(
            f"--target_far: expected a rate between {LEAST_FAR:g} and 1, together with --val_path, got {target_far}"
        )
    if precision.startswith("int8") != (calibration is not None):
        raise UsageError("--precision int8 and --calibration FOLDER, some of the training pictures, go together")
    if precision == "fp32":
        return target_far
    if val_path is None:
        raise UsageError(f"--precision {precision}: expected --val_path, the pictures that show what it costs")
    return target_far or DEFAULT_TARGET_FAR


def _require_recent_onnxruntime() -> None:
    """The proof is worth what the runtime that gives it is worth: a bundle runs on older ones, an export does not."""
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        raise EnvironmentFault(
            f"ONNX Runtime {version} is installed, export needs {'.'.join(map(str, MIN_ONNXRUNTIME))} or newer; "
            "run: pip install --upgrade onnxruntime",
            code="package-too-old",
        )


def _refuse_too_large(checkpoint: Checkpoint, precision: str) -> bool:
    """Whether the backbone fits into one ONNX file of float32, which holds less than 2 GiB.

    Raises:
        CheckpointError: it does not fit in this precision.
    """
    numbers = sum(
        value.numel()
        for name, value in checkpoint.model_state.items()
        if str(name).startswith("backbone.") and isinstance(value, torch.Tensor)
    )
    fits = 4 * numbers < MAX_GRAPH_BYTES
    if not fits and precision != "fp16":
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.backbone} takes {4 * numbers / 1e9:.1f} GB in float32, and one ONNX file "
            "holds less than 2.1 GB; export it with --precision fp16",
            code="network-too-large",
        )
    return fits


def _bundle(
    checkpoint: Checkpoint,
    reference: TorchVerifier,
    backbone: onnx.ModelProto,
    head: onnx.ModelProto,
    precision: str,
) -> Bundle:
    preprocess = reference.preprocess
    files = [serialized(model, {}) for model in (backbone, head)]
    metadata = {
        "siamese_backbone": checkpoint.backbone,
        "siamese_embedding_dim": str(reference.model.embedding_dim),
        "siamese_precision": precision,
        "siamese_preprocess": json.dumps(preprocess.to_json(), sort_keys=True),
    }
    # The same in both graphs, so that whoever uses them without a manifest can tell that they belong together.
    model_id = hashlib.sha256(b"".join((*files, json.dumps(metadata, sort_keys=True).encode()))).hexdigest()
    files = [serialized(model, metadata | {"siamese_model_id": model_id}) for model in (backbone, head)]
    manifest = Manifest(
        backbone=checkpoint.backbone,
        embedding_dim=reference.model.embedding_dim,
        preprocess=preprocess,
        precision=precision,
        batch=BATCH_RANGE,
        threshold=DEFAULT_THRESHOLD,
        threshold_origin="default: the reference scripts' 0.5, not chosen on data",
        golden=_golden(reference) if precision == "fp32" else _golden_of(files, preprocess, precision),
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        about={"model_id": model_id},
    )
    return Bundle(manifest, *files)


def _golden(reference: TorchVerifier) -> Golden:
    embedding = reference.embed(golden_image(reference.preprocess.size_hw)[None])
    return Golden(embedding[0], float(reference.score(embedding, embedding)[0]))


def _golden_of(files: list[bytes], preprocess: Preprocess, precision: str) -> Golden:
    """What graphs of a lower precision answer, by their own account: PyTorch's answer is too far away to check with."""
    backbone, head = (open_session(file, name, "cpu") for file, name in zip(files, (BACKBONE, HEAD), strict=True))
    embedding = run_session(backbone.run, EMBEDDINGS, {IMAGES: golden_image(preprocess.size_hw)[None]}, "cpu")
    score = float(run_session(head.run, SCORES, {LEFT: embedding, RIGHT: embedding}, "cpu")[0, 0])
    if not (np.isfinite(embedding).all() and np.isfinite(score)):
        raise ParityError(
            f"in {precision} the network gives NaN or infinity; no bundle was written; choose a higher precision",
            code="not-finite",
        )
    return Golden(embedding[0], score)


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    training = checkpoint.training
    return {
        "checkpoint": {"sha256": checkpoint.sha256, "epoch": checkpoint.epoch},
        "training": {key: training[key] for key in ("data", "metrics", "validation") if key in training},
        "tools": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
        | {name: metadata.version(name) for name in _TOOLS},
    }


def _count_of(digests: frozenset[str], folder: ImageFolder) -> int:
    """How many files of the folder have one of these SHA-256."""
    found = 0
    for image in range(len(folder)):
        with contextlib.suppress(OSError):
            found += hashlib.sha256(folder.absolute_path(image).read_bytes()).hexdigest() in digests
    return found


def _parity_pictures(folder: ImageFolder | None, preprocess: Preprocess) -> tuple[Images, str]:
    """PARITY_PICTURES pictures (N, H, W, 3) uint8, and where they came from."""
    if folder is None:
        drawn = [draw_character(seed=k, variation=k) for k in range(PARITY_PICTURES)]
        return np.stack([resize_image(image, preprocess.size_hw) for image in drawn]), "drawn characters"
    pictures = list(_readable(folder, preprocess))
    if not pictures:
        raise InputDataError(f"{folder.root}: none of the pictures tried can be read", code="no-pictures")
    # A small folder is repeated, so that every batch size is measured.
    repeated = [pictures[i % len(pictures)] for i in range(PARITY_PICTURES)]
    return np.stack(repeated), f"{len(pictures)} of {folder.root.name}"


def _readable(folder: ImageFolder, preprocess: Preprocess) -> Iterator[Images]:
    # Spread evenly over the folder, so that many classes are seen.
    for image in np.unique(np.linspace(0, len(folder) - 1, PARITY_PICTURES).astype(int)).tolist():
        with contextlib.suppress(ImageError):
            yield load_image(folder.absolute_path(image), preprocess)
