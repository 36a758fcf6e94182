from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, DRAWINGS, RunCommand, assert_refused
from PIL import Image

from siamese_deploy.cli import main as siamese
from siamese_deploy.gallery.store import GalleryStore


@pytest.fixture
def gallery(tmp_path: Path, run: RunCommand, pictures: Path, tiny_bundle: Path) -> Path:
    path = tmp_path / "gallery"
    result = run(siamese, "gallery", "enrol", path, pictures, "-c", tiny_bundle, "--no_doubles")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1] == f"enrolled: {len(CLASSES) * DRAWINGS} pictures of {len(CLASSES)} identities"
    return path


def test_the_whole_life_of_a_gallery(
    run: RunCommand, gallery: Path, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = ("-c", tiny_bundle)
    listed = run(siamese, "gallery", "list", gallery)
    assert listed.stdout.splitlines()[:4] == [f"{DRAWINGS:6}  {name}" for name in CLASSES]
    rows = json.loads(run(siamese, "gallery", "list", gallery, "--json").stdout)["pictures"]
    assert {(row["name"], row["damaged"]) for row in rows} == {(name, False) for name in CLASSES}

    probe = tmp_path / "probe.png"
    Image.open(pictures / "cog/1.png").rotate(3).save(probe)
    found = run(siamese, "gallery", "identify", gallery, probe, *bundle, "--threshold", 0, "--json")
    answer = json.loads(found.stdout)
    assert found.exit_code == 0
    assert answer["decision"] == "match"
    assert answer["name"] == answer["candidates"][0]["name"]
    assert len(answer["candidates"]) == len(CLASSES)
    text = run(siamese, "gallery", "identify", gallery, probe, *bundle, "--threshold", 1, "--top", 2)
    assert text.exit_code == 10
    assert text.stdout.splitlines()[-1].startswith("no match: threshold 1.0000, margin ")
    assert len(text.stdout.splitlines()) == 3
    near = run(siamese, "gallery", "identify", gallery, probe, *bundle, "--threshold", 0, "--margin", 1)
    assert (near.exit_code, near.stdout.splitlines()[-1][:9]) == (10, "ambiguous")

    assert run(siamese, "gallery", "export", gallery, tmp_path / "out").exit_code == 0
    with open(tmp_path / "out/gallery.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    assert np.load(tmp_path / "out/embeddings.npy", allow_pickle=False).shape == (len(rows), 16)

    assert (
        run(siamese, "gallery", "remove", gallery, "bolt").stdout == f"removed: {DRAWINGS} pictures of 1 identities\n"
    )
    assert_refused(run(siamese, "gallery", "remove", gallery, "apple", "bolt"), 3, "bolt: no such identity", "nothing")
    again = run(siamese, "gallery", "reembed", gallery, *bundle)
    assert again.stdout.splitlines()[1].startswith(f"embedded again: {3 * DRAWINGS} pictures")


def test_how_many_candidates_are_shown_and_what_the_log_says(
    run: RunCommand, gallery: Path, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    for k, name in enumerate(("x", "y")):
        picture = tmp_path / f"{name}.png"
        Image.new("RGB", (40, 40), (200, 30 * k, 30)).save(picture)
        run(siamese, "gallery", "enrol", gallery, picture, "-c", tiny_bundle, "--name", name)
    probe, log = tmp_path / "probe.png", tmp_path / "log.jsonl"
    Image.open(pictures / "cog/1.png").rotate(40).save(probe)
    identify = ("gallery", "identify", gallery, probe, "-c", tiny_bundle, "--threshold", 0.0123456)
    for options, shown in (((), 5), (("--top", 1), 1)):
        result = run(siamese, *identify, *options, "--log", log)
        assert len(result.stdout.splitlines()) == shown + 1
    best, last = result.stdout.splitlines()
    decision = next(line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "decision")
    assert (f"{decision['score']:.4f}", decision["threshold"]) == (best.split()[0], 0.0123)
    assert decision["score"] == round(decision["score"], 4)
    assert decision["decision"] == last.split()[0]


def test_one_identity_by_name(
    run: RunCommand, gallery: Path, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "x.png"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture)
    enrol = ("gallery", "enrol", gallery, picture, "-c", tiny_bundle)
    assert run(siamese, *enrol, "--name", "Apple", "--no_doubles").stderr == (
        "warning: 'Apple' and 'apple' differ only in case or Unicode form\n"
    )
    assert_refused(run(siamese, *enrol, "--name", "bolt", "--no-doubles"), 3, "is enrolled as Apple already")
    assert_refused(run(siamese, *enrol, "--name", "a\tb"), 2, "printable characters")
    assert_refused(run(siamese, *enrol, picture), 2, "need --name")
    assert_refused(run(siamese, *enrol, "--name", "x", "--add", "--replace"), 2, "expected one of them")
    assert_refused(run(siamese, *enrol, "--name", "x", "--cache", tmp_path, "--no_cache"), 2, "expected one of them")
    missing = ("gallery", "enrol", gallery, tmp_path / "none.png", "-c", tiny_bundle, "--name", "none")
    assert_refused(run(siamese, *missing), 3, "none.png: cannot be opened")
    assert_refused(
        run(siamese, "gallery", "identify", gallery, tmp_path / "none.png", "-c", tiny_bundle), 3, "none.png"
    )


def test_nothing_there(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for command in (["list"], ["remove", "x"], ["export", str(tmp_path / "out")]):
        result = run(siamese, "gallery", command[0], tmp_path / "gallery", *command[1:])
        assert_refused(result, 3, "is no gallery")
    probe = pictures / "apple/0.png"
    assert_refused(run(siamese, "gallery", "identify", tmp_path / "gallery", probe, "-c", tiny_bundle), 3, "no gallery")
    wrong = run(siamese, "gallery", "identify", tmp_path / "gallery", probe, "-c", tiny_bundle, "--threshold", "nan")
    assert_refused(wrong, 2, "--threshold")
    assert not (tmp_path / "gallery").exists()
    GalleryStore.create(tmp_path / "gallery", _digest(tiny_bundle), 16)
    empty = run(siamese, "gallery", "identify", tmp_path / "gallery", probe, "-c", tiny_bundle, "--threshold", 0)
    assert (empty.exit_code, empty.stdout) == (10, "no match (the gallery is empty): threshold 0.0000\n")


def test_damage_is_told(run: RunCommand, gallery: Path, pictures: Path, tiny_bundle: Path) -> None:
    (file,) = gallery.glob("vectors-*.f32")
    data = bytearray(file.read_bytes())
    data[3] ^= 0x40
    file.write_bytes(bytes(data))
    found = run(siamese, "gallery", "identify", gallery, pictures / "apple/0.png", "-c", tiny_bundle, "--threshold", 0)
    assert found.exit_code in (0, 10)
    assert "warning: 1 rows of" in found.stderr
    listed = run(siamese, "gallery", "list", gallery)
    assert "warning: 1 rows are damaged and are never matched (first: apple)" in listed.stderr


def _digest(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text())["bundle_digest"])
