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

Messages are one line: what is wrong, with which file, and what to do. Codes are for programs, and stay what they are
when a message is put better: docs/when-it-goes-wrong.md lists them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class SiameseError(Exception):
    """`code` names the reason: the kind's, or a nearer one where there is something else to do about it."""

    exit_code: ClassVar[int] = 70
    code: str = "internal-error"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class UsageError(SiameseError):
    exit_code = 2
    code = "usage"


class InputDataError(SiameseError):
    exit_code = 3
    code = "input-data"


class ImageError(InputDataError):
    """One picture that cannot be used; `reason` is the sentence without the path."""

    code = "unreadable"

    def __init__(self, path: str, reason: str, code: str | None = None) -> None:
        super().__init__(f"{path}: {reason}", code=code)
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        # Exceptions cross process borders (data loading workers) as their constructor arguments.
        return ImageError, (self.path, self.reason, self.code)


class IntegrityError(SiameseError):
    exit_code = 4
    code = "damaged"


class BundleError(IntegrityError):
    code = "bundle-damaged"


class CheckpointError(IntegrityError):
    code = "checkpoint-damaged"


class ParityError(IntegrityError):
    code = "parity"


class AccuracyError(SiameseError):
    exit_code = 11
    code = "limit-missed"


class EnvironmentFault(SiameseError):
    exit_code = 5
    code = "environment"


class ProviderError(EnvironmentFault):
    code = "provider-unavailable"


class MissingExtraError(EnvironmentFault):
    code = "package-missing"


class BusyError(SiameseError):
    exit_code = 6
    code = "busy"


_CODE_OF_ERRNO = {
    errno.ENOENT: "not-found",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EROFS: "permission",
    errno.ENOSPC: "disk-full",
    errno.EDQUOT: "disk-full",
    errno.EFBIG: "disk-full",
    errno.EMFILE: "too-many-open-files",
    errno.ENFILE: "too-many-open-files",
    errno.ENOMEM: "out-of-memory",
    errno.EIO: "disk-fault",
    errno.ESTALE: "disk-fault",
}


def code_of(error: OSError, other: str) -> str:
    """What the system's refusal means to the user; `other` where it is none of the usual ones."""
    return _CODE_OF_ERRNO.get(error.errno or 0, other)


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
        raise EnvironmentFault(
            f"an installed package of {_PIP_EXTRA[extra]} cannot be loaded: {error}", code="library-broken"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise MissingExtraError(
            "torchvision does not fit the installed torch (a CPU-only build of torch cannot load the published "
            f"torchvision); run: pip install --force-reinstall {_PIP_EXTRA['train']}"
        ) from error
