"""Sign a bundle that is there already."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, SIGNATURE, read_bundle, refuse_target
from siamese_deploy.durable_files import folder_published_as
from siamese_deploy.signature import SigningKey


def sign_bundle(path: Path, key: SigningKey) -> str:
    """Put `key`'s signature into the bundle folder `path`, in place of another if there is one; the rest stays.

    Who reads the bundle meanwhile sees the old folder or the new one.

    Returns:
        The signed manifest_sha256 (hex).

    Raises:
        InputDataError: no such bundle.
        BundleError: not a bundle, or damaged.
        UsageError: `path` is a link.
    """
    read_bundle(path)
    with folder_published_as(path, partial(refuse_target, replace=True)) as temporary:
        for name in (BACKBONE, HEAD, MANIFEST):
            shutil.copyfile(path / name, temporary / name, follow_symlinks=False)
        read_bundle(temporary)  # the very copies: `path` may have changed since
        manifest = (temporary / MANIFEST).read_bytes()
        (temporary / SIGNATURE).write_bytes(key.sign(manifest))
    return str(json.loads(manifest)["manifest_sha256"])
