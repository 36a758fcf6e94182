"""TrainConfig: every setting of a training run, checked before any file is touched.

The command line is made from these fields, so each has one sentence, one default and one range.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from siamese_deploy.errors import UsageError

FILL_COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255)}
_RGB = re.compile(r"\d{1,3},\d{1,3},\d{1,3}")


def _setting(
    default: Any,
    help: str,
    *,
    group: str,
    limits: tuple[float, float] | None = None,
    choices: tuple[str, ...] = (),
    batch: Any = None,
    short: str = "",
    decisive: bool = True,
    only: str = "",
    frozen: bool = True,
) -> Any:
    """A field.

    Args:
        group: heading that --help shows it under.
        limits: lowest and highest value allowed.
        batch: the default where pairing is "batch", if another.
        decisive: a resumed run must share it with the interrupted one to end in the same weights.
        only: the pairing that it has an effect in, if not in both.
        frozen: whether it has an effect with a frozen backbone.
    """
    metadata = {
        "help": help, "group": group, "limits": limits, "choices": choices, "batch": batch, "short": short,
        "decisive": decisive, "only": only, "frozen": frozen,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def _path(help: str, short: str = "") -> Any:
    metadata = {"help": help, "group": "Folders", "short": short, "decisive": False}
    return dataclasses.field(metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Defaults are the reference scripts' (github.com/sohaib023/siamese-pytorch).

    Raises:
        UsageError: a value is out of its range.
    """

    train_path: Path = _path("Folder of training pictures, one sub-folder a class.")
    val_path: Path = _path("Folder of validation pictures, one sub-folder a class.")
    out_path: Path = _path("Folder for checkpoints and the TensorBoard summary.", short="-o")

    backbone: str = _setting("resnet18", "Classification network from torchvision.models.", group="Network", short="-b")
    weights: str = _setting(
        "default",
        "Initial weights: default (torchvision's pretrained ones), none (random), or a file.",
        group="Network",
    )
    image_size: int = _setting(
        224, "Height and width of the network's input, in pixels.", group="Network", limits=(16, 4096)
    )
    embedding_dim: int = _setting(
        0, "Numbers in an embedding: the backbone's last layer gets so many outputs; 0 keeps its own.",
        group="Network", limits=(0, 65_536),
    )  # fmt: skip
    freeze_backbone: bool = _setting(
        False, "Train the head alone: every picture is embedded once, unaugmented, before the first epoch.",
        group="Network",
    )  # fmt: skip
    freeze_batchnorm: bool = _setting(
        False,
        "Keep the backbone's BatchNorm statistics as the initial weights have them.",
        group="Network",
        frozen=False,
    )

    pairing: str = _setting(
        "reference",
        "reference: every picture once with one partner. batch: every pair within a batch of several classes.",
        group="Pairs", choices=("reference", "batch"),
    )  # fmt: skip
    batch_size: int = _setting(
        # BatchNorm in the head cannot learn from a single pair.
        8,
        "Pairs per step (reference pairing); a last shorter batch is dropped.",
        group="Pairs",
        limits=(2, 65_536),
        only="reference",
    )
    classes_per_batch: int = _setting(
        16,
        "Classes per step (batch pairing); fewer if there are fewer.",
        group="Pairs",
        limits=(2, 4096),
        only="batch",
    )
    images_per_class: int = _setting(
        4, "Pictures of each class per step (batch pairing); a smaller class gives all it has.",
        group="Pairs", limits=(2, 1024), only="batch",
    )  # fmt: skip
    hard_negatives: float = _setting(
        0.0, "Weigh pairs of different classes by their score to this power, so that the most confused count most.",
        group="Pairs", limits=(0, 10),
    )  # fmt: skip
    identity_loss: float = _setting(
        0.0, "Weight of a classification loss over the training classes; its layer is not part of the network.",
        group="Pairs", limits=(0, 100), batch=1.0, frozen=False,
    )  # fmt: skip
    label_smoothing: float = _setting(
        0.1,
        "Share of the classification target that is spread over all classes.",
        group="Pairs",
        limits=(0, 0.9),
        frozen=False,
    )

    epochs: int = _setting(
        1000, "Passes over the training pictures.", group="Optimisation", limits=(1, 1_000_000), batch=60, short="-e"
    )
    learning_rate: float = _setting(
        1e-4, "Step size of the optimiser, after warm-up.", group="Optimisation", limits=(1e-12, 10), batch=2e-3,
        short="-lr",
    )  # fmt: skip
    optimizer: str = _setting(
        "adam", "Adam, or AdamW, whose weight decay is apart from the gradient.", group="Optimisation",
        choices=("adam", "adamw"), batch="adamw",
    )  # fmt: skip
    weight_decay: float = _setting(
        0.0, "Pull of weights towards 0; biases and normalisation layers are spared.", group="Optimisation",
        limits=(0, 10), batch=0.01,
    )  # fmt: skip
    schedule: str = _setting(
        "constant", "Learning rate after warm-up: constant, or down to 0 along half a cosine.", group="Optimisation",
        choices=("constant", "cosine"), batch="cosine",
    )  # fmt: skip
    warmup_epochs: float = _setting(
        0.0, "Epochs over which the learning rate rises from 0.", group="Optimisation", limits=(0, 10_000), batch=2.0
    )
    clip_norm: float = _setting(
        0.0, "Longest gradient (L2 norm over all weights) that a step may take; 0 sets no limit.",
        group="Optimisation", limits=(0, 1e6),
    )  # fmt: skip
    ema: float = _setting(
        0.0, "Decay of a moving average of the weights, such as 0.99, that is validated and saved instead; 0: none.",
        group="Optimisation", limits=(0, 0.99999),
    )  # fmt: skip
    early_stopping: int = _setting(
        0, "Stop after so many epochs without a lower validation loss; 0 never does.", group="Optimisation",
        limits=(0, 1_000_000),
    )  # fmt: skip

    augment: float = _setting(
        1.0,
        "Multiplies the four limits below; 0 turns them all off.",
        group="Augmentation",
        limits=(0, 4),
        frozen=False,
    )
    rotate: float = _setting(
        20.0,
        "Pictures are turned by up to so many degrees.",
        group="Augmentation",
        limits=(0, 180),
        frozen=False,
    )
    shift: float = _setting(
        0.2,
        "Shifted by up to this share of width and height.",
        group="Augmentation",
        limits=(0, 0.5),
        batch=0.1,
        frozen=False,
    )
    scale: float = _setting(
        0.2, "Enlarged or shrunk by up to this share.", group="Augmentation", limits=(0, 0.5), frozen=False
    )
    shear: float = _setting(
        0.2,
        "Sheared along x by up to so many degrees.",
        group="Augmentation",
        limits=(0, 45),
        batch=15.0,
        frozen=False,
    )
    no_flip: bool = _setting(
        False,
        "Do not mirror pictures: for things whose mirror image is another thing.",
        group="Augmentation",
        frozen=False,
    )
    fill: str = _setting(
        "black", "What comes in at the borders: black, white, border (each picture's own border colour) or R,G,B.",
        group="Augmentation", batch="border", frozen=False,
    )  # fmt: skip

    amp: str = _setting(
        "off", "Mixed precision in the backbone: off, bf16 or fp16 (made for CUDA; the head stays in float32).",
        group="Machine", choices=("off", "bf16", "fp16"), frozen=False,
    )  # fmt: skip
    channels_last: bool = _setting(
        False,
        "Keep pictures as NHWC in memory, which tensor cores prefer.",
        group="Machine",
        frozen=False,
    )
    device: str = _setting(
        "auto", "auto (CUDA if PyTorch has it, else CPU), cpu, cuda or cuda:N.", group="Machine", decisive=False
    )
    workers: int = _setting(
        0, "Processes that load pictures; 0: the training process itself.", group="Machine", limits=(0, 256),
        decisive=False,
    )  # fmt: skip
    cache_mib: int = _setting(
        1024, "Memory for decoded training pictures, in MiB; those beyond it are decoded anew each time.",
        group="Machine", limits=(0, 2**24), decisive=False, frozen=False,
    )  # fmt: skip
    seed: int = _setting(
        1, "Seed of initial weights, pair lists, augmentation and dropout.", group="Machine", limits=(0, 2**32 - 1)
    )

    save_after: int = _setting(
        25, "Keep a checkpoint epoch_<n>.pth every so many epochs.", group="Run", limits=(1, 1_000_000_000), short="-s",
        decisive=False,
    )  # fmt: skip
    save_minutes: float = _setting(
        5.0, "Write last.pth at least every so many minutes.", group="Run", limits=(0, 1440), decisive=False
    )
    resume: bool = _setting(
        False, "Go on from the newest good checkpoint in OUT_PATH, if there is one.", group="Run", decisive=False
    )
    resume_changed: bool = _setting(
        False, "Resume even if settings or pictures changed; the epoch under way then starts again.", group="Run",
        decisive=False,
    )  # fmt: skip

    @classmethod
    def with_recipe(cls, pairing: str = "reference", **settings: Any) -> TrainConfig:
        """Settings that are not given take the default that goes with `pairing`.

        Raises:
            UsageError: a value is out of its range, or has no effect together with the others.
        """
        frozen = settings.get("freeze_backbone", False)
        for field in dataclasses.fields(cls):
            if settings.get(field.name) and field.metadata.get("only") not in (None, "", pairing):
                raise UsageError(f"--{field.name}: has no effect with --pairing {pairing}; leave it out")
            if settings.get(field.name) and frozen and not field.metadata.get("frozen", True):
                raise UsageError(f"--{field.name}: has no effect with --freeze_backbone; leave it out")
        recipe = {} if pairing != "batch" else {
            field.name: field.metadata["batch"]
            for field in dataclasses.fields(cls)
            if field.metadata.get("batch") is not None
        }  # fmt: skip
        return cls(**(recipe | settings), pairing=pairing)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limits, choices = field.metadata.get("limits"), field.metadata.get("choices")
            if limits and not limits[0] <= value <= limits[1]:  # also for NaN
                raise UsageError(f"--{field.name}: expected {limits[0]:,} to {limits[1]:,}, got {value}")
            if choices and value not in choices:
                raise UsageError(f"--{field.name}: expected {' or '.join(choices)}, got {value}")
        if self.fill not in (*FILL_COLOURS, "border") and not (
            _RGB.fullmatch(self.fill) and all(int(level) <= 255 for level in self.fill.split(","))
        ):
            raise UsageError(f"--fill: expected black, white, border or R,G,B (0 to 255 each), got {self.fill}")

    def decisive_settings(self) -> dict[str, Any]:
        """Those that a resumed run must share with the interrupted one to end in the same weights."""
        fields = dataclasses.fields(self)
        return {field.name: getattr(self, field.name) for field in fields if field.metadata["decisive"]}

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they are kept in a checkpoint."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
