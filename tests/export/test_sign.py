from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import RunCommand, assert_refused
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from networks import SMALL, own_checkpoint, random_network

from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, SIGNATURE, read_bundle
from siamese_export.cli import main as export_main


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """key.pem, and key.pub beside it."""
    made = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private, public = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pem").write_bytes(made.private_bytes(pem, private, serialization.NoEncryption()))
    (tmp_path / "key.pub").write_bytes(made.public_key().public_bytes(pem, public))
    return tmp_path / "key.pem"


def test_an_export_is_signed_when_it_appears(run: RunCommand, key: Path, tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "best.pth", random_network(), *SMALL)
    target = tmp_path / "bundle"
    result = run(export_main, "-c", checkpoint, "-o", target, "--sign", key)
    assert result.exit_code == 0, result.output
    bundle = read_bundle(target, verify_key=key.with_suffix(".pub"))
    assert f"\nmanifest digest: {bundle.manifest_digest}\n" in result.stdout
    read_bundle(target, expect_digest=bundle.manifest_digest)
    shown = run(export_main, "--show", target)
    assert f"manifest digest: {bundle.manifest_digest}\n" in shown.stdout
    assert "signed:          yes" in shown.stdout


def test_a_bundle_that_is_there_is_signed_and_nothing_else_of_it_changes(
    run: RunCommand, key: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    assert "signed:          no" in run(export_main, "--show", bundle).stdout
    for _ in range(2):  # a second time too
        result = run(export_main, "--bundle", bundle, "--sign", key)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"signed: {bundle}, manifest digest {read_bundle(tiny_bundle).manifest_digest}\n"
        read_bundle(bundle, verify_key=key.with_suffix(".pub"))
    for name in (BACKBONE, HEAD, MANIFEST):
        assert (bundle / name).read_bytes() == (tiny_bundle / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["bundle", "key.pem", "key.pub"]


def test_what_cannot_be_signed_is_left_as_it_is(run: RunCommand, key: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (tmp_path / "link").symlink_to(bundle)
    assert_refused(run(export_main, "--bundle", tmp_path / "link", "--sign", key), 2, "is a link")
    (bundle / HEAD).write_bytes(b"damaged")
    assert_refused(run(export_main, "--bundle", bundle, "--sign", key), 4, "head.onnx: damaged")
    assert SIGNATURE not in os.listdir(bundle)
    assert_refused(run(export_main, "--show", bundle, "--sign", key), 2, "--sign has no effect together with --show")


def test_a_key_that_is_none_ends_before_the_export_begins(run: RunCommand, key: Path, tmp_path: Path) -> None:
    arguments = ("-c", tmp_path / "absent.pth", "-o", tmp_path / "bundle", "--sign")
    assert_refused(run(export_main, *arguments, key.with_suffix(".pub")), 4, "expected an Ed25519 private key")
    assert_refused(run(export_main, *arguments, tmp_path / "absent.pem"), 3, "no such key file")
