from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import make_bundle

from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, golden_image, read_bundle
from siamese_deploy.errors import BundleError, InputDataError, UsageError
from siamese_deploy.preprocess import Preprocess


@pytest.fixture
def bundle_path(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def test_reads_back_what_was_written(tiny_bundle: Path) -> None:
    written, read = make_bundle(), read_bundle(tiny_bundle)
    assert (read.backbone, read.head, read.digest) == (written.backbone, written.head, written.digest)
    assert np.array_equal(read.manifest.golden.embedding, written.manifest.golden.embedding)
    assert replace(read.manifest, golden=written.manifest.golden) == written.manifest
    assert sorted(os.listdir(tiny_bundle)) == [BACKBONE, HEAD, MANIFEST]


def test_digest_covers_what_decides_an_answer_and_nothing_else() -> None:
    bundle = make_bundle()
    later = replace(bundle, manifest=replace(bundle.manifest, created_utc="2030-01-01T00:00:00+00:00", threshold=0.9))
    assert later.digest == bundle.digest
    changed = [
        replace(bundle, backbone=bundle.backbone + b" "),
        replace(bundle, head=bundle.head + b" "),
        replace(bundle, manifest=replace(bundle.manifest, precision="fp16")),
        replace(bundle, manifest=replace(bundle.manifest, preprocess=Preprocess((32, 24)))),
    ]
    assert len({bundle.digest, *(other.digest for other in changed)}) == 5


def test_golden_image_rule_never_changes() -> None:
    image = golden_image((20, 30))
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [0, 85, 170]
    assert image[19, 29].tolist() == [(3 * 19 + 5 * 29 + 7 * 2 * 3 + 85 * c) % 256 for c in range(3)]


def test_every_flipped_byte_of_the_manifest_is_refused(bundle_path: Path) -> None:
    text = (bundle_path / MANIFEST).read_bytes()
    for where in range(len(text)):
        (bundle_path / MANIFEST).write_bytes(text[:where] + bytes([text[where] ^ 1]) + text[where + 1 :])
        with pytest.raises(BundleError, match=MANIFEST):
            read_bundle(bundle_path)


def test_the_same_content_in_other_bytes_is_refused(bundle_path: Path) -> None:
    manifest = json.loads((bundle_path / MANIFEST).read_text())
    for text in (json.dumps(manifest), json.dumps(manifest, sort_keys=True, indent=2), json.dumps(manifest, indent=4)):
        (bundle_path / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match="not canonical JSON"):
            read_bundle(bundle_path)


@pytest.mark.parametrize("name", [BACKBONE, HEAD])
def test_a_changed_shortened_or_missing_graph_is_refused(bundle_path: Path, name: str) -> None:
    graph = (bundle_path / name).read_bytes()
    for damaged in (graph[:-1], b"", graph[:100] + bytes([graph[100] ^ 128]) + graph[101:]):
        (bundle_path / name).write_bytes(damaged)
        with pytest.raises(BundleError, match=f"{name}: damaged"):
            read_bundle(bundle_path)
    (bundle_path / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        read_bundle(bundle_path)
    (bundle_path / name).symlink_to(bundle_path.parent / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        read_bundle(bundle_path)
    (bundle_path / name).unlink()
    (bundle_path / name).mkdir()
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BundleError, match="expected a plain file"):
        read_bundle(bundle_path)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_graph_that_may_not_be_read_is_not_called_damaged(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refused(path: str, *arguments: int) -> int:
        if Path(path).name == BACKBONE:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return really(path, *arguments)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        read_bundle(bundle_path)


def test_swapped_graphs_are_refused(bundle_path: Path) -> None:
    (bundle_path / HEAD).rename(bundle_path / "x")
    (bundle_path / BACKBONE).rename(bundle_path / HEAD)
    (bundle_path / "x").rename(bundle_path / BACKBONE)
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(bundle_path)


def test_what_is_no_bundle_is_said(tmp_path: Path, bundle_path: Path) -> None:
    with pytest.raises(InputDataError, match="no such bundle"):
        read_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        read_bundle(tmp_path)
    (tmp_path / "best.pth").touch()
    with pytest.raises(BundleError, match="siamese-train-eval"):
        read_bundle(tmp_path / "best.pth")
    (bundle_path / "extra.txt").touch()
    with pytest.raises(BundleError, match=r"do not belong to a bundle \(extra\.txt\)"):
        read_bundle(bundle_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{}", "damaged"),
        (b"[]", "damaged"),
        (b"not json", "damaged"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"[" * 100_000, "damaged"),
        (b'{"a": NaN}', "damaged"),
        (b'{"format": "siamese-bundle/2"}', "use a matching version"),
        (b" " * (2**20 + 1), "at most 1,048,576 bytes"),
    ],
)
def test_other_texts_are_no_manifest(bundle_path: Path, text: bytes, words: str) -> None:
    (bundle_path / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=words):
        read_bundle(bundle_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding_dim": 17}, "golden embedding: expected 17 numbers, got 16"),
        ({"preprocess": Preprocess((24, 32), resize="nearest")}, "preprocess: expected"),
        ({"preprocess": Preprocess((24, 0))}, r"size_hw: expected two positive whole numbers, got \[24, 0\]"),
        ({"preprocess": Preprocess((None, 32))}, r"size_hw: expected two positive"),  # type: ignore[arg-type]
        ({"batch": (1, 4, 0)}, "batch: expected 1 <= min <= opt <= max"),
        ({"precision": "int8"}, "precision: expected one of fp32, fp16, int8-cpu, int8-tensorrt, got 'int8'"),
    ],
)
def test_a_whole_manifest_with_wrong_values_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    bundle = make_bundle()
    replace(bundle, manifest=replace(bundle.manifest, **change)).write(tmp_path / "bundle")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=words):
        read_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_may_be_any_score(tmp_path: Path, threshold: float) -> None:
    bundle = make_bundle()
    replace(bundle, manifest=replace(bundle.manifest, threshold=threshold)).write(tmp_path / "bundle")
    assert read_bundle(tmp_path / "bundle").manifest.threshold == threshold


def test_a_digest_that_is_not_the_graphs_is_refused(bundle_path: Path) -> None:
    manifest = json.loads((bundle_path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["bundle_digest"] = "0" * 64
    manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (bundle_path / MANIFEST).write_bytes(canonical(manifest))
    with pytest.raises(BundleError, match="bundle_digest does not match the graphs"):
        read_bundle(bundle_path)


def canonical(value: dict[str, object]) -> bytes:
    """As the module's docstring describes it."""
    return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode("ascii")


def test_writing_is_atomic_and_never_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle().write(tmp_path / "bundle")
    with pytest.raises(UsageError, match="exists already"):
        make_bundle().write(tmp_path / "bundle")
    bundle = make_bundle()
    bundle.manifest.about["not json"] = {1, 2}
    with pytest.raises(TypeError):
        bundle.write(tmp_path / "other")
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_bundle_replaced_while_it_is_read_is_read_whole(tmp_path: Path) -> None:
    one = make_bundle()
    producer = b"\x12\x05other"  # the field producer_name
    other = replace(one, backbone=one.backbone + producer, head=one.head + producer)
    target = tmp_path / "bundle"
    one.write(target)
    stop = threading.Event()

    def replace_again_and_again() -> None:
        while not stop.is_set():
            for bundle in (other, one):
                bundle.write(target, replace=True)

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    try:
        seen = {read_bundle(target).digest for _ in range(2000)}
    finally:
        stop.set()
        writer.join()
    assert seen == {one.digest, other.digest}
    assert os.listdir(tmp_path) == ["bundle"]


def test_only_a_bundle_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    for names in ([], [MANIFEST], [MANIFEST, HEAD], [MANIFEST, BACKBONE, HEAD, "notes.txt"], ["notes.txt"]):
        for name in names:
            (target / name).write_text("{}")
        with pytest.raises(UsageError, match="is no bundle"):
            make_bundle().write(target, replace=True)
        assert sorted(os.listdir(target)) == sorted(names)
        shutil.rmtree(target)
        target.mkdir()
    target.rmdir()
    make_bundle().write(target)
    (target / BACKBONE).unlink()  # an incomplete one is one
    make_bundle().write(target, replace=True)
    (target / MANIFEST).write_bytes(b"damaged")
    make_bundle().write(target, replace=True)
    assert read_bundle(target).digest == make_bundle().digest


def test_manifest_is_readable_json_for_people(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    assert manifest["format"] == "siamese-bundle/1"
    assert manifest["preprocess"]["size_hw"] == [24, 32]
    assert manifest["threshold"] == {"value": 0.5, "origin": "test"}


def test_a_graph_is_looked_at_before_anybody_runs_it(tmp_path: Path) -> None:
    """Hashes that are right do not make it harmless."""
    bundle = make_bundle()
    training_info = b"\xa2\x01\x00"
    replace(bundle, head=bundle.head + training_info).write(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"head\.onnx.*train"):
        read_bundle(tmp_path / "bundle")
