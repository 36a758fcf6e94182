"""Errors a user can meet, and the exit code a command ends with.

    SiameseError                    70  never raised itself
    |-- UsageError                   2  an option or an output path is wrong
    |-- InputDataError               3  folders and pictures
    |   `-- ImageError               3  one picture that cannot be used
    |-- IntegrityError               4  exists, but is not what it should be; NaN
    |   |-- BundleError              4
    |   |-- CheckpointError          4
    |   `-- ParityError              4  exported graphs do not answer like the network they came from
    |-- AccuracyError               11  a limit on accuracy is not met
    |-- EnvironmentFault             5  provider, driver, missing extra, memory, disk, permission
    |   |-- ProviderError            5
    |   `-- MissingExtraError        5
    `-- BusyError                    6  another run holds the output folder

Messages are one line: what is wrong, with which file, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class SiameseError(Exception):
    exit_code: ClassVar[int] = 70


class UsageError(SiameseError):
    exit_code = 2


class InputDataError(SiameseError):
    exit_code = 3


class ImageError(InputDataError):
    """One picture that cannot be used; `reason` is the sentence without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # Exceptions cross process borders (data loading workers) as their constructor arguments.
        return ImageError, (self.path, self.reason)


class IntegrityError(SiameseError):
    exit_code = 4


class BundleError(IntegrityError):
    pass


class CheckpointError(IntegrityError):
    pass


class ParityError(IntegrityError):
    pass


class AccuracyError(SiameseError):
    exit_code = 11


class EnvironmentFault(SiameseError):
    exit_code = 5


class ProviderError(EnvironmentFault):
    pass


class MissingExtraError(EnvironmentFault):
    pass


class BusyError(SiameseError):
    exit_code = 6


def one_line(message: str) -> str:
    """The message with line breaks and control characters escaped: names of files are data, also on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)


_MODULES_OF_EXTRA = {
    "cpu": ("onnxruntime",),
    "train": ("torch", "torchvision", "tensorboard"),
    "export": ("torch", "torchvision", "tensorboard", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "check": ("imagehash", "scipy", "pywt"),
    "sign": ("cryptography", "_cffi_backend"),
}
_PIP_EXTRA = {
    "cpu": "'siamese-toolkit[cpu]' (or [gpu] on a machine with an NVIDIA GPU; on a Jetson see docs/jetson.md)",
    "train": "'siamese-toolkit[train]'",
    "export": "'siamese-toolkit[export,cpu]'",
    "check": "'siamese-toolkit[check]'",
    "sign": "'siamese-toolkit[sign]'",
}


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of optional packages: a missing one becomes the pip command that installs it.

    Raises:
        MissingExtraError: a package of `extra` ("cpu", "train", "export", "check" or "sign") is absent, or torch and
            torchvision are builds that do not fit together.
        EnvironmentFault: a package is installed and cannot be loaded.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _MODULES_OF_EXTRA[extra]:
            raise
        raise MissingExtraError(f"{package} is not installed; run: pip install {_PIP_EXTRA[extra]}") from error
    except ImportError as error:  # installed, but a library it needs is not: say which
        raise EnvironmentFault(f"an installed package of {_PIP_EXTRA[extra]} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise MissingExtraError(
            "torchvision does not fit the installed torch (a CPU-only build of torch cannot load the published "
            f"torchvision); run: pip install --force-reinstall {_PIP_EXTRA['train']}"
        ) from error
