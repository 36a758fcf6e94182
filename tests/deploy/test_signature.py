"""Only the bundle that was meant: pinned by its digest, or signed by somebody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from conftest import RunCommand, assert_refused
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from tiny_bundle import make_bundle

from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, SIGNATURE, read_bundle
from siamese_deploy.cli import main as siamese
from siamese_deploy.cli.eval import main as siamese_eval
from siamese_deploy.errors import BundleError, InputDataError, IntegrityError, UsageError
from siamese_deploy.signature import SigningKey

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
NO_PASSWORD = serialization.NoEncryption()
FOREIGN = "0" * 64


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """owner.pem and stranger.pem with owner.pub and stranger.pub; curve.pem and curve.pub of another algorithm."""
    folder = tmp_path_factory.mktemp("keys")
    made = {"owner": ed25519.Ed25519PrivateKey.generate(), "stranger": ed25519.Ed25519PrivateKey.generate()}
    for name, key in {**made, "curve": ec.generate_private_key(ec.SECP256R1())}.items():
        (folder / f"{name}.pem").write_bytes(key.private_bytes(PEM, PKCS8, NO_PASSWORD))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    locked = made["owner"].private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(locked)
    return folder


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    make_bundle().write(tmp_path / "signed", key=SigningKey(keys / "owner.pem"))
    return tmp_path / "signed"


def manifest_digest(bundle: Path) -> str:
    return str(json.loads((bundle / MANIFEST).read_text())["manifest_sha256"])


@pytest.fixture
def commands(pictures: Path, tmp_path: Path, run: RunCommand) -> dict[str, Callable[..., Result]]:
    """Every command that runs a bundle, as a function of the bundle and the options under test."""
    one, other = pictures / "apple/0.png", pictures / "apple/1.png"
    folder = tmp_path / "gallery"
    return {
        "eval": lambda b, more: run(siamese_eval, "-v", pictures, "-o", tmp_path / "eval", "-c", b, *more),
        "verify": lambda b, more: run(siamese, "verify", one, other, "-c", b, "--threshold", 0, *more),
        "enrol": lambda b, more: run(siamese, "gallery", "enrol", folder, one, "--name", "apple", "-c", b, *more),
        "identify": lambda b, more: run(
            siamese, "gallery", "identify", folder, one, "-c", b, "--threshold", 0, "--margin", 0, *more
        ),
        "reembed": lambda b, more: run(siamese, "gallery", "reembed", folder, "-c", b, *more),
        "prepare": lambda b, more: run(siamese, "prepare", b, "--provider", "cpu", *more),
        "bench": lambda b, more: run(
            siamese, "bench", b, "-v", pictures, "--min_seconds", 0, "--gallery_rows", 4, "--pairs", 4, *more
        ),
    }  # fmt: skip


def test_every_command_runs_the_right_bundle_and_no_other(
    signed: Path, keys: Path, commands: dict[str, Callable[..., Result]], tmp_path: Path
) -> None:
    lowered = make_bundle()  # the same network, and a threshold that lets everybody in
    lowered = replace(lowered, manifest=replace(lowered.manifest, threshold=0.0))
    lowered.write(tmp_path / "lowered", key=SigningKey(keys / "stranger.pem"))
    assert read_bundle(tmp_path / "lowered").digest == read_bundle(signed).digest
    good = ("--expect_digest", manifest_digest(signed).upper(), "--verify-key", keys / "owner.pub")
    for name, command in commands.items():
        result = command(tmp_path / "lowered", good[:2])
        assert_refused(result, 4, "lowered: is another bundle", manifest_digest(signed), lowered.manifest_digest)
        assert_refused(command(tmp_path / "lowered", good[2:]), 4, "is not what the owner of", "owner.pub")
        assert result.stdout == "", name
        allowed = command(signed, good)
        assert allowed.exit_code == 0, (name, allowed.stderr, allowed.exception)


def test_the_digest_that_leaves_the_threshold_out_pins_nothing(signed: Path) -> None:
    bundle = read_bundle(signed)
    assert bundle.manifest_digest == manifest_digest(signed) != bundle.digest
    assert read_bundle(signed, expect_digest=bundle.manifest_digest).digest == bundle.digest
    with pytest.raises(BundleError, match="is its bundle_digest, which leaves the threshold out"):
        read_bundle(signed, expect_digest=bundle.digest)
    with pytest.raises(BundleError, match=f"expected {FOREIGN}, got {bundle.manifest_digest}"):
        read_bundle(signed, expect_digest=FOREIGN)
    for text in ("", bundle.manifest_digest[:16], bundle.manifest_digest + "0", "g" * 64, " " * 64, "é" * 64):
        with pytest.raises(UsageError, match="expected the 64 hexadecimal digits"):
            read_bundle(signed, expect_digest=text)


def test_a_bundle_that_is_only_compared_with_is_not_the_pinned_one(
    signed: Path, other_bundle: Path, keys: Path, pictures: Path, tmp_path: Path, run: RunCommand
) -> None:
    arguments = ("-v", pictures, "-o", tmp_path / "eval", "-c", signed, "--compare", other_bundle)
    result = run(siamese_eval, *arguments, "--expect_digest", manifest_digest(signed))
    assert result.exit_code == 0, result.stderr
    result = run(siamese_eval, *arguments, "--verify_key", keys / "owner.pub")  # that it is signed holds for both
    assert_refused(result, 4, f"{other_bundle}: is not signed")


def test_bench_wants_a_digest_for_each_bundle(
    signed: Path, other_bundle: Path, pictures: Path, run: RunCommand
) -> None:
    pins = ("--expect_digest", manifest_digest(signed))
    command = (siamese, "bench", signed, other_bundle, "-v", pictures)
    assert_refused(run(*command, *pins), 2, "expected one for each of 2 bundles, got 1")
    assert_refused(run(*command, *pins, *pins), 4, f"{other_bundle}: is another bundle")
    assert_refused(
        run(siamese, "bench", signed, signed, "-v", pictures, *pins, *pins[:1], FOREIGN), 4, "another bundle"
    )


def damaged_ways(signed: Path, stranger: SigningKey) -> Iterator[str]:
    """Alters the bundle in one way after the other, and names it."""
    manifest, signature = (signed / MANIFEST).read_bytes(), (signed / SIGNATURE).read_bytes()
    for where in range(0, len(signature)):
        (signed / SIGNATURE).write_bytes(signature[:where] + bytes([signature[where] ^ 1]) + signature[where + 1 :])
        yield f"byte {where} of the signature"
    for other in (b"", signature[:-1], signature + b"\n", stranger.sign(manifest)):
        (signed / SIGNATURE).write_bytes(other)
        yield f"signature {other!r}"
    (signed / SIGNATURE).write_bytes(signature)
    for name in (BACKBONE, HEAD, MANIFEST):
        data = (signed / name).read_bytes()
        (signed / name).write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        yield name
        (signed / name).write_bytes(data)
    shutil.rmtree(signed)
    bundle = make_bundle()
    replace(bundle, manifest=replace(bundle.manifest, threshold=0.0)).write(signed)
    yield "unsigned"
    (signed / SIGNATURE).write_bytes(signature)
    yield "another whole bundle under the old signature"
    (signed / SIGNATURE).unlink()
    (signed.parent / "elsewhere").write_bytes(signature)
    (signed / SIGNATURE).symlink_to(signed.parent / "elsewhere")
    yield "a link"


def test_what_was_not_signed_by_the_owner_is_refused(signed: Path, keys: Path) -> None:
    assert read_bundle(signed, verify_key=keys / "owner.pub").digest == make_bundle().digest
    ways = 0
    for way in damaged_ways(signed, SigningKey(keys / "stranger.pem")):
        with pytest.raises(BundleError):
            read_bundle(signed, verify_key=keys / "owner.pub")
            pytest.fail(f"accepted: {way}")
        ways += 1
    assert ways == 64 + 4 + 3 + 3


def test_without_the_key_a_signed_bundle_is_a_bundle_like_any_other(signed: Path, tiny_bundle: Path) -> None:
    assert read_bundle(signed).digest == read_bundle(tiny_bundle).digest
    assert manifest_digest(signed) == manifest_digest(tiny_bundle)
    make_bundle().write(signed, replace=True)  # and may be replaced
    assert sorted(os.listdir(signed)) == [BACKBONE, HEAD, MANIFEST]


def test_a_signature_made_for_another_purpose_is_none(signed: Path, keys: Path) -> None:
    raw = serialization.load_pem_private_key((keys / "owner.pem").read_bytes(), None)
    assert isinstance(raw, ed25519.Ed25519PrivateKey)
    (signed / SIGNATURE).write_bytes(raw.sign((signed / MANIFEST).read_bytes()))
    with pytest.raises(BundleError, match="is not what the owner of"):
        read_bundle(signed, verify_key=keys / "owner.pub")
    (signed / SIGNATURE).write_bytes(raw.sign(b"siamese-bundle-v1\0" + (signed / MANIFEST).read_bytes()))
    read_bundle(signed, verify_key=keys / "owner.pub")


@pytest.mark.parametrize("name", ["owner.pem", "curve.pub", "nonsense"])
def test_what_is_no_public_key_is_said_and_lets_nothing_pass(signed: Path, keys: Path, name: str) -> None:
    (keys / "nonsense").write_bytes(b"-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n")
    with pytest.raises(IntegrityError, match=f"{name}: expected an Ed25519 public key"):
        read_bundle(signed, verify_key=keys / name)


@pytest.mark.parametrize("name", ["owner.pub", "curve.pem"])
def test_what_is_no_private_key_is_said(keys: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match=f"{name}: expected an Ed25519 private key"):
        SigningKey(keys / name)


def test_a_missing_or_locked_key_is_said(signed: Path, keys: Path) -> None:
    with pytest.raises(InputDataError, match="nothing: no such key file"):
        read_bundle(signed, verify_key=keys / "nothing")
    with pytest.raises(InputDataError, match="is a folder; expected a key file"):
        read_bundle(signed, verify_key=keys)
    with pytest.raises(IntegrityError, match="the key has a password"):
        SigningKey(keys / "locked.pem")


def test_only_who_asks_for_a_signature_needs_the_extra(signed: Path, keys: Path, pictures: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['cryptography'] = None\n"
        "from siamese_deploy.cli import main\n"
        "main(sys.argv[1:])\n"
    )  # fmt: skip
    picture = str(pictures / "apple/0.png")
    command = [sys.executable, "-c", code, "verify", picture, picture, "-c", str(signed), "--threshold", "0"]
    pinned = subprocess.run([*command, "--expect_digest", manifest_digest(signed)], capture_output=True, text=True)
    assert pinned.returncode == 0, pinned.stderr
    refused = subprocess.run([*command, "--verify_key", str(keys / "owner.pub")], capture_output=True, text=True)
    assert refused.returncode == 5
    assert "cryptography is not installed; run: pip install 'siamese-toolkit[sign]'" in refused.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_the_commands_of_the_documentation_make_keys_and_check_signatures(tmp_path: Path) -> None:
    """Somebody else's program says the same of the signature."""

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=tmp_path, check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", "bundle-key.pem")
    openssl("pkey", "-in", "bundle-key.pem", "-pubout", "-out", "bundle-key.pub")
    make_bundle().write(tmp_path / "bundle", key=SigningKey(tmp_path / "bundle-key.pem"))
    read_bundle(tmp_path / "bundle", verify_key=tmp_path / "bundle-key.pub")
    (tmp_path / "message").write_bytes(b"siamese-bundle-v1\0" + (tmp_path / "bundle" / MANIFEST).read_bytes())
    check = ("-verify", "-pubin", "-inkey", "bundle-key.pub", "-rawin", "-sigfile", f"bundle/{SIGNATURE}")
    openssl("pkeyutl", *check, "-in", "message")
    with pytest.raises(subprocess.CalledProcessError):
        openssl("pkeyutl", *check, "-in", f"bundle/{MANIFEST}")
