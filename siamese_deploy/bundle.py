"""A bundle is a folder of three files: manifest.json, backbone.onnx, head.onnx. Write it, read it, prove it intact.

A fourth, manifest.sig, is there where somebody signed it; it is read by those who ask for the signature.

The manifest is canonical JSON (sorted keys, two-space indent, ASCII) and is refused unless its bytes are exactly that.
It holds the SHA-256 of both graphs and of itself (computed without the field `manifest_sha256`). The graphs' hashes are
checked on the very bytes that are handed to ONNX Runtime: nothing is opened twice.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from siamese_deploy.durable_files import folder_published_as, refuse_existing
from siamese_deploy.errors import BundleError, InputDataError, UsageError
from siamese_deploy.graph_check import check_graph
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.signature import SIGNATURE_BYTES, SigningKey, VerifyKey
from siamese_deploy.verifier import Embeddings

FORMAT = "siamese-bundle/1"
MANIFEST, BACKBONE, HEAD = "manifest.json", "backbone.onnx", "head.onnx"
SIGNATURE = "manifest.sig"
MAX_MANIFEST_BYTES = 2**20
MAX_GRAPH_BYTES = 2**31 - 1
# Tensor names of the two graphs.
IMAGES, EMBEDDINGS = "images", "embeddings"
LEFT, RIGHT, SCORES = "left", "right", "scores"
GOLDEN_RULE = "ramp-v1"
PRECISIONS = ("fp32", "fp16", "int8-cpu", "int8-tensorrt")
"""Of the backbone's numbers; the head's are float32. Of int8 there are two, as none serves CPU and TensorRT alike."""

T = TypeVar("T")


@dataclass(frozen=True)
class Golden:
    """What the network must answer to the picture of `golden_image`.

    As PyTorch computed it at export; in a precision below fp32, as the exported graphs did on the CPU.
    """

    embedding: Embeddings
    """(dim,) float32."""
    score: float
    """Score of the pair (picture, same picture), in [0, 1]."""

    def to_json(self) -> dict[str, Any]:
        embedding = base64.b64encode(self.embedding.astype("<f4").tobytes()).decode("ascii")
        return {"rule": GOLDEN_RULE, "embedding_float32_base64": embedding, "score": self.score}


@dataclass(frozen=True)
class Manifest:
    backbone: str
    """Name in torchvision.models."""
    embedding_dim: int
    preprocess: Preprocess
    precision: str
    """One of PRECISIONS."""
    batch: tuple[int, int, int]
    """Smallest, best and largest number of pictures per backbone run."""
    threshold: float
    """Operating threshold in [0, 1]."""
    threshold_origin: str
    golden: Golden
    created_utc: str
    """ISO 8601."""
    about: dict[str, Any] = field(default_factory=dict)
    """For people: training, parity, tools. Not read by the runtime."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:  # NaN is neither
            raise ValueError(f"threshold: expected a number in [0, 1], got {self.threshold}")


@dataclass(frozen=True)
class Bundle:
    """A complete, proven model: what the manifest says and the bytes of both graphs."""

    manifest: Manifest
    backbone: bytes = field(repr=False)
    head: bytes = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over graphs, pre-processing and precision: all that decides an answer, and nothing else."""
        return _sha256(
            _canonical_json(
                {
                    BACKBONE: _sha256(self.backbone),
                    HEAD: _sha256(self.head),
                    "preprocess": self.manifest.preprocess.to_json(),
                    "precision": self.manifest.precision,
                }
            )
        )

    @property
    def manifest_digest(self) -> str:
        """SHA-256 (hex) of the manifest that `write` writes, its field `manifest_sha256`: what `expect_digest` pins."""
        return _sha256(_canonical_json(_manifest_value(self)))

    def write(self, target: Path, *, replace: bool = False, key: SigningKey | None = None) -> None:
        """Publish as the folder `target`, complete or not at all.

        Args:
            replace: `target` may be a bundle already, whole or damaged; it stays until the new one is complete.
            key: signs it.

        Raises:
            UsageError: as `refuse_target`.
        """
        with folder_published_as(target, partial(refuse_target, replace=replace)) as temporary:
            (temporary / BACKBONE).write_bytes(self.backbone)
            (temporary / HEAD).write_bytes(self.head)
            manifest = _manifest_bytes(self)
            (temporary / MANIFEST).write_bytes(manifest)
            if key is not None:
                (temporary / SIGNATURE).write_bytes(key.sign(manifest))


def read_bundle(
    path: str | os.PathLike[str],
    *,
    expect_digest: str | None = None,
    verify_key: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Read and check a bundle folder.

    Args:
        expect_digest: the only `manifest_sha256` to accept, 64 hexadecimal digits. It covers graphs, threshold and all
            the rest; the `bundle_digest`, which leaves the threshold out, is refused.
        verify_key: file with the public key (Ed25519, PEM) that the bundle must be signed with.

    Raises:
        InputDataError: `path` or `verify_key` does not exist.
        BundleError: not a bundle, incomplete, with files that do not belong to it, damaged, or of a newer format; not
            the one expected, or not signed with the key.
        IntegrityError: `verify_key` holds no such key.
        MissingExtraError: `verify_key` needs the package cryptography.
        UsageError: `expect_digest` is not 64 hexadecimal digits.
    """
    folder = Path(path)
    if expect_digest is not None:
        expect_digest = _checked_digest(expect_digest)
    key = None if verify_key is None else VerifyKey(verify_key)
    while True:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # while it is open, no other folder gets its inode number
                held.callback(os.close, os.open(folder, os.O_RDONLY))
            before = _identity(folder)
            try:
                return _read_bundle(folder, expect_digest, key)
            except (BundleError, FileNotFoundError):
                if _identity(folder) == before:
                    raise
                # The whole bundle was replaced between two of its files: read the new one.


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read_bundle(folder: Path, expect_digest: str | None, key: VerifyKey | None) -> Bundle:
    if not folder.exists():
        raise InputDataError(f"{folder}: no such bundle", code="not-found")
    if not folder.is_dir():
        hint = "; a checkpoint is evaluated with siamese-train-eval" if folder.suffix == ".pth" else ""
        raise BundleError(
            f"{folder}: is a file; expected a bundle folder holding {MANIFEST}{hint}", code="not-a-bundle"
        )
    names = sorted(os.listdir(folder))
    if MANIFEST not in names:
        raise BundleError(f"{folder}: is no bundle ({MANIFEST} is missing)", code="not-a-bundle")
    for expected in (BACKBONE, HEAD):
        if expected not in names:
            raise BundleError(f"{folder}: incomplete bundle ({expected} is missing); copy or export it again")
    foreign = [name for name in names if name not in (MANIFEST, BACKBONE, HEAD, SIGNATURE)]
    if foreign:
        raise BundleError(
            f"{folder}: holds files that do not belong to a bundle ({', '.join(foreign)}); remove them",
            code="bundle-extra-files",
        )
    text = _read_regular(folder / MANIFEST, MAX_MANIFEST_BYTES)
    if key is not None:
        if SIGNATURE not in names:
            raise BundleError(
                f"{folder}: is not signed ({SIGNATURE} is missing); expected a bundle from the key's owner",
                code="bundle-signature",
            )
        key.check(text, _read_regular(folder / SIGNATURE, SIGNATURE_BYTES), folder)
    manifest, files, digest, manifest_digest = _parse_manifest(folder / MANIFEST, text)
    if expect_digest is not None and manifest_digest != expect_digest:
        raise _unexpected(folder, expect_digest, digest, manifest_digest)
    graphs = {}
    for name in (BACKBONE, HEAD):
        graphs[name] = _read_regular(folder / name, MAX_GRAPH_BYTES)
        found = _sha256(graphs[name])
        if found != files.get(name):
            raise BundleError(
                f"{folder / name}: damaged (SHA-256 expected {files.get(name)}, got {found}); copy or export it again"
            )
        check_graph(folder / name, graphs[name])
    bundle = Bundle(manifest, graphs[BACKBONE], graphs[HEAD])
    if bundle.digest != digest:
        raise BundleError(f"{folder / MANIFEST}: bundle_digest does not match the graphs; export the bundle again")
    return bundle


def _checked_digest(text: str) -> str:
    digest = text.lower()
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UsageError(f"expect_digest: expected the 64 hexadecimal digits of a manifest_sha256, got {text!r}")
    return digest


def _unexpected(folder: Path, expected: str, bundle_digest: str, manifest_digest: str) -> BundleError:
    if expected == bundle_digest:
        return BundleError(
            f"{folder}: {expected} is its bundle_digest, which leaves the threshold out and pins nothing; expect the "
            "manifest_sha256 that siamese-export printed",
            code="bundle-unexpected",
        )
    return BundleError(
        f"{folder}: is another bundle than the one to expect (manifest_sha256 expected {expected}, got "
        f"{manifest_digest}); get that bundle again, or expect the digest that siamese-export printed for this one",
        code="bundle-unexpected",
    )


def refuse_target(target: Path, *, replace: bool) -> None:
    """Raises:
    UsageError: the parent folder of `target` does not exist; or `target` does, and is not to be replaced or no bundle.
    """
    if not (replace and os.path.lexists(target)):
        return refuse_existing(target)
    if target.is_symlink() or not target.is_dir():
        raise UsageError(
            f"{target}: is a {'link' if target.is_symlink() else 'file'}; expected a bundle to replace",
            code="output-exists",
        )
    names = set(os.listdir(target)) - {SIGNATURE}
    ours = names == {MANIFEST, BACKBONE, HEAD} or (
        MANIFEST in names
        and names < {MANIFEST, BACKBONE, HEAD}
        and b'"format": "siamese-bundle/' in _read_regular(target / MANIFEST, MAX_MANIFEST_BYTES)
    )
    if not ours:
        raise UsageError(
            f"{target}: is no bundle, and only a bundle may be replaced; choose another folder", code="output-exists"
        )


def golden_image(size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 picture of rule "ramp-v1": (3y + 5x + 7 (y // 8)(x // 8) + 85 channel) mod 256."""
    y, x, channel = np.ogrid[: size_hw[0], : size_hw[1], :3]
    pixels: npt.NDArray[np.uint8] = ((3 * y + 5 * x + 7 * (y // 8) * (x // 8) + 85 * channel) % 256).astype(np.uint8)
    return pixels


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def _manifest_value(bundle: Bundle) -> dict[str, Any]:
    """All of it but its own hash."""
    manifest = bundle.manifest
    return {
        "format": FORMAT,
        "backbone": manifest.backbone,
        "embedding_dim": manifest.embedding_dim,
        "preprocess": manifest.preprocess.to_json(),
        "precision": manifest.precision,
        "batch": dict(zip(("min", "opt", "max"), manifest.batch, strict=True)),
        "threshold": {"value": manifest.threshold, "origin": manifest.threshold_origin},
        "golden": manifest.golden.to_json(),
        "created_utc": manifest.created_utc,
        "about": manifest.about,
        "files": {BACKBONE: _sha256(bundle.backbone), HEAD: _sha256(bundle.head)},
        "bundle_digest": bundle.digest,
    }


def _manifest_bytes(bundle: Bundle) -> bytes:
    return _canonical_json(_manifest_value(bundle) | {"manifest_sha256": bundle.manifest_digest})


def _read_regular(path: Path, limit_bytes: int) -> bytes:
    # No links are followed, and a named pipe must not hang the run.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise BundleError(f"{path}: is a link or a socket; expected a plain file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
        os.close(descriptor)
        raise BundleError(f"{path}: expected a plain file of at most {limit_bytes:,} bytes")
    with open(descriptor, "rb") as file:
        return file.read()


def _parse_manifest(path: Path, text: bytes) -> tuple[Manifest, dict[str, str], str, str]:
    """The manifest, the graphs' hashes by file name, the bundle digest and the manifest's own."""
    damaged = f"{path}: damaged; copy or export the bundle again"
    try:
        value = json.loads(text.decode("ascii"), object_pairs_hook=_unique_keys)
        canonical = _canonical_json(value)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{damaged} (not canonical JSON: {error})") from error
    if isinstance(value, dict) and value.get("format") not in (None, FORMAT):
        raise BundleError(
            f"{path}: format {value['format']!r}, this program reads {FORMAT!r}; use a matching version",
            code="other-version",
        )
    if not isinstance(value, dict) or canonical != text:
        raise BundleError(f"{damaged} (not canonical JSON)")
    stated = value.pop("manifest_sha256", None)
    found = _sha256(_canonical_json(value))
    if stated != found:
        raise BundleError(f"{damaged} (manifest_sha256 expected {stated}, got {found})")
    try:
        return _manifest_from(value), _typed(value, "files", dict), _typed(value, "bundle_digest", str), found
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path}: {error.args[0]}") from error


def _manifest_from(value: dict[str, Any]) -> Manifest:
    _typed(value, "format", str)  # which one was looked at before the hash
    pre, batch, threshold, golden = (_typed(value, key, dict) for key in ("preprocess", "batch", "threshold", "golden"))
    size_hw = _typed(pre, "size_hw", list)
    if len(size_hw) != 2 or not all(type(side) is int and side > 0 for side in size_hw):
        raise ValueError(f"preprocess.size_hw: expected two positive whole numbers, got {size_hw}")
    preprocess = Preprocess((size_hw[0], size_hw[1]))
    if pre != preprocess.to_json():
        raise ValueError(f"preprocess: expected {preprocess.to_json()}, got {pre}; use a matching version")
    if _typed(golden, "rule", str) != GOLDEN_RULE:
        raise ValueError(f"golden.rule: expected {GOLDEN_RULE!r}, got {golden['rule']!r}; use a matching version")
    if _typed(value, "precision", str) not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {value['precision']!r}")
    dim = _typed(value, "embedding_dim", int)
    embedding = np.frombuffer(base64.b64decode(_typed(golden, "embedding_float32_base64", str)), dtype="<f4")
    if embedding.shape != (dim,):
        raise ValueError(f"golden embedding: expected {dim} numbers, got {embedding.size}")
    least, best, most = (_typed(batch, key, int) for key in ("min", "opt", "max"))
    if not 1 <= least <= best <= most:
        raise ValueError(f"batch: expected 1 <= min <= opt <= max, got {batch}")
    return Manifest(
        backbone=_typed(value, "backbone", str),
        embedding_dim=dim,
        preprocess=preprocess,
        precision=value["precision"],
        batch=(least, best, most),
        threshold=_typed(threshold, "value", float),
        threshold_origin=_typed(threshold, "origin", str),
        golden=Golden(embedding.astype(np.float32), _typed(golden, "score", float)),
        created_utc=_typed(value, "created_utc", str),
        about=_typed(value, "about", dict),
    )


def _typed(value: dict[str, Any], key: str, kind: type[T]) -> T:
    if type(value.get(key)) is not kind:
        raise ValueError(f"{key}: expected {kind.__name__}, got {type(value.get(key)).__name__}")
    return value[key]  # type: ignore[no-any-return]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value
