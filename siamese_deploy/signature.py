"""Whose bundle is it? A detached Ed25519 signature (RFC 8032) over the manifest.

The manifest holds the SHA-256 of both graphs, and all else that decides an answer, so its signature is the bundle's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from siamese_deploy.errors import BundleError, InputDataError, IntegrityError, needs_extra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_BYTES = 64
# Signed with the manifest, so that what was signed for another purpose is no signature of a bundle, nor the reverse.
_CONTEXT = b"siamese-bundle-v1\0"
_MAX_KEY_BYTES = 2**14


class SigningKey:
    """An Ed25519 private key.

    Args:
        path: PEM file (PKCS#8) without a password.

    Raises:
        MissingExtraError: the package cryptography is not installed.
        InputDataError: no such file.
        IntegrityError: it holds no such key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._key = _private_key(Path(path))

    def sign(self, manifest: bytes) -> bytes:
        """SIGNATURE_BYTES bytes."""
        return self._key.sign(_CONTEXT + manifest)


class VerifyKey:
    """An Ed25519 public key.

    Args:
        path: PEM file (SubjectPublicKeyInfo, as `openssl pkey -pubout` writes).

    Raises:
        MissingExtraError: the package cryptography is not installed.
        InputDataError: no such file.
        IntegrityError: it holds no such key.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._key = _public_key(self._path)

    def check(self, manifest: bytes, signature: bytes, bundle: Path) -> None:
        """Raises:
        BundleError: `signature` is not this key's, or not of these bytes.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, _CONTEXT + manifest)
        except InvalidSignature as error:
            raise BundleError(
                f"{bundle}: is not what the owner of {self._path} signed; do not use it, and get it again from whom "
                "you trust (or the right key)",
                code="bundle-signature",
            ) from error


def _private_key(path: Path) -> Ed25519PrivateKey:
    with needs_extra("sign"):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    data = _read_key(path)
    try:
        key = load_pem_private_key(data, None)
    except TypeError as error:
        raise IntegrityError(
            f"{path}: the key has a password; expected one without (openssl pkey removes it)", code="key-unusable"
        ) from error
    except Exception as error:  # a parser of strangers' bytes, which promises no more than that it raises
        raise _no_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    with needs_extra("sign"):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    data = _read_key(path)
    try:
        key = load_pem_public_key(data)
    except Exception as error:  # as above
        raise _no_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public")
    return key


def _no_key(path: Path, which: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: expected an Ed25519 {which} key in PEM form (docs/bundle.md says how to make one)",
        code="key-unusable",
    )


def _read_key(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputDataError(f"{path}: no such key file", code="not-found") from error
    except IsADirectoryError as error:
        raise InputDataError(f"{path}: is a folder; expected a key file") from error
