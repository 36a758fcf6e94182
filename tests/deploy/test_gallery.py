from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import CLASSES, DRAWINGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image
from tiny_bundle import make_bundle

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import BusyError, EnvironmentFault, ImageError, InputDataError, IntegrityError, UsageError
from siamese_deploy.gallery import twins
from siamese_deploy.gallery.copies import export_gallery, reembed
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.store import CHUNK_ROWS, DATABASE, GalleryStore
from siamese_deploy.gallery.vectors import VectorFile, checksums
from siamese_deploy.image_folder import scan_image_folder


@pytest.fixture(scope="module")
def verifier(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu")


@pytest.fixture
def gallery(tmp_path: Path, verifier: OnnxVerifier, pictures: Path) -> Gallery:
    """All pictures but the last of each class."""
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    for name in CLASSES:
        gallery.enrol(name, [pictures / name / f"{k}.png" for k in range(DRAWINGS - 1)], doubles=False)
    return gallery


def _slightly_other(model: onnx.ModelProto) -> None:
    weight = next(item for item in model.graph.initializer if item.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), "weight"))


def vectors_file(gallery: Gallery) -> Path:
    (file,) = gallery.store.folder.glob("vectors-*.f32")
    return file


def test_identify_gives_exactly_the_scores_of_verify(gallery: Gallery, verifier: OnnxVerifier, pictures: Path) -> None:
    probe = pictures / "bolt/3.png"
    found = gallery.identify(probe, top=len(CLASSES))
    assert [c.name for c in found.candidates] == sorted(
        CLASSES, key=lambda name: -next(c.score for c in found.candidates if c.name == name)
    )
    for candidate in found.candidates:
        scores = [verifier.compare(probe, pictures / candidate.name / f"{k}.png") for k in range(DRAWINGS - 1)]
        assert candidate.score == max(scores)
        assert candidate.pictures == len(scores)
        assert gallery.verify(probe, candidate.name) == candidate
    mean = gallery.identify(probe, per_identity="mean", top=1).candidates[0]
    scores = [verifier.compare(probe, pictures / mean.name / f"{k}.png") for k in range(DRAWINGS - 1)]
    assert mean.score == pytest.approx(np.mean(scores), abs=1e-6)


def test_order_of_enrolment_does_not_change_an_answer(
    gallery: Gallery, tmp_path: Path, verifier: OnnxVerifier, pictures: Path
) -> None:
    other = Gallery(tmp_path / "other", verifier, create=True)
    for name in reversed(CLASSES):
        for k in reversed(range(DRAWINGS - 1)):
            other.enrol(name, [pictures / name / f"{k}.png"], add=True, doubles=False)
    for name in CLASSES:
        assert gallery.identify(pictures / name / "3.png", top=9) == other.identify(pictures / name / "3.png", top=9)


@pytest.mark.parametrize(
    ("threshold", "min_margin", "decision"), [(0.0, 0.0, "match"), (1.0, 0.0, "no match"), (0.0, 1.0, "ambiguous")]
)
def test_decisions(gallery: Gallery, pictures: Path, threshold: float, min_margin: float, decision: str) -> None:
    found = gallery.identify(pictures / "cog/3.png", threshold=threshold, min_margin=min_margin)
    first = gallery.identify(pictures / "cog/3.png", threshold=threshold, min_margin=min_margin, top=1)
    assert first == replace(found, candidates=found.candidates[:1])
    assert found.decision == decision
    assert found.margin == found.candidates[0].score - found.candidates[1].score
    assert found.name == (found.candidates[0].name if decision == "match" else None)


def test_equal_scores_are_no_match(tmp_path: Path, verifier: OnnxVerifier, pictures: Path) -> None:
    Image.open(pictures / "apple/3.png").save(tmp_path / "twin.bmp")  # other bytes, the same pixels
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    gallery.enrol("zoe", [pictures / "apple/3.png"], doubles=False)
    assert gallery.identify(pictures / "apple/3.png", threshold=0).decision == "match"
    gallery.enrol("adam", [tmp_path / "twin.bmp"], doubles=False)
    found = gallery.identify(pictures / "apple/3.png", threshold=0)
    assert (found.decision, found.name, found.margin) == ("ambiguous", None, 0.0)
    assert [candidate.name for candidate in found.candidates] == ["adam", "zoe"]


def test_an_empty_gallery_matches_nobody(tmp_path: Path, verifier: OnnxVerifier, pictures: Path) -> None:
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    found = gallery.identify(pictures / "apple/0.png", threshold=0)
    assert (found.decision, found.name, found.candidates, found.margin) == ("no match", None, (), None)
    with pytest.raises(InputDataError, match="no such identity"):
        gallery.verify(pictures / "apple/0.png", "apple")


@pytest.mark.parametrize(
    "arguments",
    [
        {"top": 0},
        {"threshold": float("nan")},
        {"threshold": -0.01},
        {"threshold": 1.01},
        {"min_margin": -0.01},
        {"min_margin": 1.01},
        {"per_identity": "min"},
    ],
)
def test_arguments_out_of_range(gallery: Gallery, pictures: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="identify: expected"):
        gallery.identify(pictures / "apple/0.png", **arguments)  # type: ignore[arg-type]


def test_enrolling_twice(gallery: Gallery, pictures: Path, verifier: OnnxVerifier) -> None:
    zero, three = pictures / "apple/0.png", pictures / "apple/3.png"
    assert gallery.enrol("apple", [zero]).pictures == 0  # no news
    with pytest.raises(InputDataError, match="--add adds the 1 new"):
        gallery.enrol("apple", [zero, three])
    with pytest.raises(InputDataError, match="is enrolled as apple already"):
        gallery.enrol("impostor", [zero])
    assert gallery.enrol("apple", [three, three], add=True).pictures == 1
    assert len(gallery.store.pictures("apple")) == DRAWINGS
    assert gallery.enrol("apple", [zero], replace=True).pictures == 1
    assert [picture.source for picture in gallery.store.pictures("apple")] == [str(zero)]
    found = gallery.identify(three, top=9)
    assert next(c for c in found.candidates if c.name == "apple").score == verifier.compare(three, zero)
    assert "impostor" not in {c.name for c in found.candidates}


def test_an_enrolment_is_whole_or_not_at_all(gallery: Gallery, pictures: Path) -> None:
    before = gallery.store.pictures()
    with pytest.raises(InputDataError, match="enrolled as bolt"):
        gallery.enrol("new", [pictures / "apple/3.png", pictures / "bolt/0.png"])
    assert gallery.store.pictures() == before


def test_a_folder_is_enrolled_by_class_and_goes_on_after_a_stop(
    tmp_path: Path, verifier: OnnxVerifier, pictures: Path
) -> None:
    (pictures / "bolt/1.png").write_bytes(b"no picture")
    folder = scan_image_folder(pictures)
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    gallery.enrol("apple", [pictures / f"apple/{k}.png" for k in range(DRAWINGS)])  # as far as the first run came
    gallery.enrol("cog", [pictures / "cog/0.png"])  # of another day: has pictures to come
    done = gallery.enrol_folder(folder, doubles=False)
    assert (done.identities, done.pictures) == (2, 2 * DRAWINGS - 1)
    assert [Path(skipped.path).name for skipped in done.skipped] == ["1.png"]
    assert [refused.path for refused in done.refused] == ["cog"]
    assert gallery.enrol_folder(folder, add=True, doubles=False).pictures == DRAWINGS - 1
    assert len(gallery.store.pictures()) == len(folder) - 1


def test_somebody_who_matches_another_is_told(gallery: Gallery, pictures: Path, tmp_path: Path) -> None:
    Image.open(pictures / "apple/0.png").save(tmp_path / "again.bmp")
    gallery.verifier.bundle = replace(
        gallery.verifier.bundle, manifest=replace(gallery.verifier.bundle.manifest, threshold=0.0)
    )
    alone = Gallery(tmp_path / "alone", gallery.verifier, create=True)
    try:
        told = gallery.enrol("incognito", [tmp_path / "again.bmp"]).doubles
        assert alone.enrol("me", [pictures / "apple/0.png", tmp_path / "again.bmp"]).doubles == []  # only oneself
    finally:
        gallery.verifier.bundle = make_bundle()
    assert len(told) == 1
    assert "again.bmp (incognito) matches" in told[0]


def test_any_picture_can_be_enrolled_once(gallery: Gallery, pictures: Path) -> None:
    image = Image.open(pictures / "door/3.png").convert("RGB")
    assert gallery.enrol("array", [np.asarray(image)], doubles=False).pictures == 1
    assert gallery.enrol("array", [image], doubles=False).pictures == 0  # the same pixels
    assert gallery.store.pictures("array")[0].source == ""
    probe = (pictures / "door/3.png").read_bytes()
    assert gallery.verify(probe, "array").score == gallery.verifier.compare(probe, image)
    with pytest.raises(ImageError, match="too small"):
        gallery.identify(np.zeros((4, 4, 3), np.uint8))


def test_the_bytes_of_a_file_are_that_file(gallery: Gallery, pictures: Path) -> None:
    data = (pictures / "apple/0.png").read_bytes()
    for same in (data, bytearray(data), memoryview(data)):
        assert gallery.enrol("apple", [same]).pictures == 0  # type: ignore[list-item]


def test_removed_is_gone_from_the_disk_too(gallery: Gallery, pictures: Path) -> None:
    (row,) = gallery.store.pictures("bolt")[:1]
    vector = vectors_file(gallery).read_bytes()[row.slot * 4 * gallery.verifier.embedding_dim :][:64]
    assert gallery.remove("bolt", "cog") == 2 * (DRAWINGS - 1)
    assert {c.name for c in gallery.identify(pictures / "bolt/3.png").candidates} == {"apple", "door"}
    everything = b"".join(path.read_bytes() for path in gallery.store.folder.iterdir())
    assert vector not in everything
    assert b"bolt" not in everything
    with pytest.raises(InputDataError, match="nobody: no such identity"):
        gallery.remove("apple", "nobody")
    assert len(gallery.store.pictures("apple")) == DRAWINGS - 1  # all or none
    size = vectors_file(gallery).stat().st_size
    gallery.enrol("bolt", [pictures / "bolt/0.png"], doubles=False)
    assert vectors_file(gallery).stat().st_size == size  # the freed room is used again


def test_what_a_failed_or_killed_writer_left_is_wiped(gallery: Gallery, pictures: Path) -> None:
    file, size = vectors_file(gallery), 4 * gallery.verifier.embedding_dim
    rows = {picture.slot: picture for picture in gallery.store.pictures()}
    gallery.remove("bolt")
    left = next(slot for slot, picture in rows.items() if picture.name == "bolt")
    gallery.store._announce_use_of_slots(1)  # what a writer does first; then it writes, and is killed
    with open(file, "r+b") as raw:
        raw.seek(left * size)
        raw.write(b"\x01" * size)
        raw.seek(0, os.SEEK_END)
        raw.write(b"\x01" * size)
    gallery.remove("cog")
    assert b"\x01" * size not in file.read_bytes()
    used = {picture.slot for picture in gallery.store.pictures()}
    for slot in range(len(file.read_bytes()) // size):
        vector = file.read_bytes()[slot * size : (slot + 1) * size]
        assert any(vector) == (slot in used)


def test_replaced_is_gone_from_the_disk_too(gallery: Gallery, pictures: Path) -> None:
    size = 4 * gallery.verifier.embedding_dim
    old = [vectors_file(gallery).read_bytes()[p.slot * size :][:size] for p in gallery.store.pictures("apple")]
    gallery.enrol("apple", [pictures / "apple/3.png"], replace=True, doubles=False)
    for vector in old:
        assert vector not in vectors_file(gallery).read_bytes()


@pytest.mark.parametrize("how", ["remove", "replace"])
def test_an_index_that_misses_a_row_keeps_none_behind(how: str, gallery: Gallery, pictures: Path) -> None:
    def execute(statement: str, *values: object) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(gallery.store.folder / DATABASE)) as database, database:
            database.execute("PRAGMA writable_schema = ON")
            return database.execute(statement, values).fetchall()

    gallery.enrol("apple", [pictures / "apple/3.png"], add=True, doubles=False)
    (row,) = execute("DELETE FROM picture WHERE slot = (SELECT max(slot) FROM picture) RETURNING *")
    (index,) = execute("DELETE FROM sqlite_master WHERE name = 'picture_of_identity' RETURNING *")
    execute("INSERT INTO picture VALUES (?, ?, ?, ?, ?, ?, ?)", *row)
    execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", *index)
    if how == "remove":
        assert gallery.remove("apple") == DRAWINGS
    else:
        gallery.enrol("apple", [pictures / "apple/0.png"], replace=True, doubles=False)
    left = [picture.source for picture in gallery.store.pictures() if picture.name not in CLASSES[1:]]
    assert left == ([] if how == "remove" else [str(pictures / "apple/0.png")])
    assert gallery.identify(pictures / "apple/3.png").damaged == 0


def test_a_replacement_writes_beside_what_it_replaces(gallery: Gallery, pictures: Path) -> None:
    """Until it is committed, the old rows must be whole."""
    before = {picture.slot for picture in gallery.store.pictures()}
    gallery.enrol("apple", [pictures / f"apple/{k}.png" for k in range(3)], replace=True, doubles=False)
    assert {picture.slot for picture in gallery.store.pictures("apple")} & before == set()


def test_a_damaged_picture_can_be_enrolled_again(gallery: Gallery, pictures: Path) -> None:
    probe = pictures / "apple/0.png"
    before = gallery.identify(probe, top=9)
    slot = next(p.slot for p in gallery.store.pictures("apple") if p.source == str(probe))
    with open(vectors_file(gallery), "r+b") as file:
        file.seek(slot * 4 * gallery.verifier.embedding_dim)
        file.write(b"\x01\x02\x03")
    assert gallery.identify(probe).damaged == 1
    assert gallery.enrol("apple", [pictures / f"apple/{k}.png" for k in range(3)], doubles=False).pictures == 1
    assert gallery.identify(probe, top=9) == before


def test_decided_when_it_is_written_not_before(gallery: Gallery, pictures: Path, tmp_path: Path) -> None:
    """Two galleries open on one folder, as two processes have them."""
    other = Gallery(gallery.store.folder, gallery.verifier)
    gallery.enrol("eve", [pictures / "apple/3.png"], doubles=False)
    with pytest.raises(InputDataError, match="enrolled already"):
        other.enrol("eve", [pictures / "bolt/3.png"], doubles=False)
    with pytest.raises(InputDataError, match="is enrolled as eve already"):
        other.enrol("adam", [pictures / "apple/3.png"], doubles=False)
    other.enrol("eve", [pictures / "bolt/3.png"], replace=True, doubles=False)
    assert [picture.source for picture in gallery.store.pictures("eve")] == [str(pictures / "bolt/3.png")]


def test_a_gallery_made_anew_under_an_open_one(gallery: Gallery, verifier: OnnxVerifier, pictures: Path) -> None:
    gallery._device_bytes = 2**20
    gallery.identify(pictures / "apple/0.png")
    shutil.rmtree(gallery.store.folder)
    anew = Gallery(gallery.store.folder, verifier, create=True)
    for name in reversed(CLASSES):  # as many changes as before
        anew.enrol(name[::-1], [pictures / name / f"{k}.png" for k in range(DRAWINGS - 1)], doubles=False)
    assert gallery.identify(pictures / "apple/0.png") == anew.identify(pictures / "apple/0.png")


def test_more_rows_than_a_chunk(tmp_path: Path) -> None:
    store = GalleryStore.create(tmp_path / "gallery", "digest", 2)
    groups = []
    for who in range(5):
        stored = [StoredPicture(f"id{who}", f"{who} {k}".encode().ljust(32), "") for k in range(CHUNK_ROWS // 2)]
        numbers = np.arange(len(stored), dtype=np.float32) + who * 10_000
        groups.append(Group(f"id{who}", stored, np.stack([numbers, -numbers], axis=1)))
    assert [len(outcome) for outcome in store.enrol(groups)] == [CHUNK_ROWS // 2] * 5
    store.remove(["id1", "id2"])  # a hole as large as a chunk, across the border of two
    with store.snapshot() as snapshot:
        seen = np.concatenate([vectors.copy() for _, vectors in snapshot.sound_vectors()])
        rows = np.concatenate([row for row, _ in snapshot.sound_vectors()])
        some = [len(vectors) for _, vectors in snapshot.sound_vectors(np.arange(len(rows)) % 3 == 0)]
    assert np.array_equal(rows, np.arange(3 * CHUNK_ROWS // 2))
    assert np.array_equal(seen, np.concatenate([groups[who].vectors for who in (0, 3, 4)]))
    assert sum(some) == -(-len(rows) // 3)


def test_a_damaged_row_is_never_matched(gallery: Gallery, pictures: Path) -> None:
    probe = pictures / "apple/0.png"
    slot = next(p.slot for p in gallery.store.pictures("apple") if p.source == str(probe))
    with open(vectors_file(gallery), "r+b") as file:
        file.seek(slot * 4 * gallery.verifier.embedding_dim + 5)
        file.write(b"\xff\xff\xff")  # NaN
    found = gallery.identify(probe, top=9)
    assert found.damaged == 1
    assert next(c for c in found.candidates if c.name == "apple").pictures == DRAWINGS - 2


def test_a_vector_file_cut_short_is_no_crash(gallery: Gallery, pictures: Path) -> None:
    os.truncate(vectors_file(gallery), 4 * gallery.verifier.embedding_dim + 2)
    found = gallery.identify(pictures / "apple/0.png", threshold=0)
    assert found.damaged == len(CLASSES) * (DRAWINGS - 1) - 1
    vectors_file(gallery).unlink()
    assert gallery.identify(pictures / "apple/0.png", threshold=0).decision == "no match"


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE identity SET name = 'mallory' WHERE name = 'apple'",
        "UPDATE picture SET identity = 2 WHERE identity = 1",
        "UPDATE picture SET checksum = checksum + 1 WHERE identity = 1",
        "UPDATE picture SET slot = slot + 1000 WHERE identity = 1",
        "UPDATE picture SET enrolled_utc = CAST(x'32fe30' AS TEXT) WHERE identity = 1",  # not UTF-8
        "UPDATE picture SET enrolled_utc = x'ff' WHERE identity = 1",
    ],
)
def test_a_changed_record_is_never_matched(gallery: Gallery, pictures: Path, damage: str) -> None:
    database = sqlite3.connect(gallery.store.folder / DATABASE)
    with database:
        database.execute(damage)
        database.execute("UPDATE change SET number = number + 1")
    database.close()
    found = gallery.identify(pictures / "apple/0.png", top=9)
    assert found.damaged == DRAWINGS - 1
    assert {c.name for c in found.candidates} == {"bolt", "cog", "door"}
    with pytest.raises(IntegrityError, match="rows are damaged"):
        reembed(gallery.store.folder, gallery.verifier)


def test_of_another_bundle_is_refused_until_embedded_again(gallery: Gallery, pictures: Path, tmp_path: Path) -> None:
    other = OnnxVerifier(make_bundle(_slightly_other), provider="cpu")
    with pytest.raises(IntegrityError, match="is enrolled with another bundle"):
        Gallery(gallery.store.folder, other)
    gallery.remove("bolt")
    (pictures / "cog/0.png").rename(tmp_path / "away.png")
    with pytest.raises(InputDataError, match=r"1 of 9 source pictures .*cog/0.png"):
        reembed(gallery.store.folder, other)
    Gallery(gallery.store.folder, gallery.verifier)  # as it was
    shutil.copy(pictures / "apple/3.png", pictures / "cog/0.png")  # another picture in its place
    with pytest.raises(InputDataError, match="1 of 9 source pictures"):
        reembed(gallery.store.folder, other)
    (tmp_path / "away.png").rename(pictures / "cog/0.png")
    assert reembed(gallery.store.folder, other) == 9
    again = Gallery(gallery.store.folder, other)
    for name in ("apple", "cog", "door"):
        expected = max(other.compare(pictures / name / "3.png", pictures / name / f"{k}.png") for k in range(3))
        assert again.verify(pictures / name / "3.png", name).score == expected
    assert again.identify(pictures / "door/3.png").damaged == 0
    assert vectors_file(again).stat().st_size == 9 * 4 * other.embedding_dim  # the only one
    with pytest.raises(IntegrityError, match="another bundle"):
        Gallery(gallery.store.folder, gallery.verifier)
    for stale in (lambda: gallery.identify(pictures / "door/3.png"), lambda: gallery.enrol("x", [tmp_path / "t.png"])):
        Image.new("RGB", (30, 30)).save(tmp_path / "t.png")
        with pytest.raises(IntegrityError, match="another bundle"):  # opened before
            stale()


def test_embedding_again_is_refused_if_something_changed_meanwhile(
    gallery: Gallery, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = OnnxVerifier(make_bundle(_slightly_other), provider="cpu")
    embed = other.embed
    renamed = iter(
        (
            lambda: gallery.remove("bolt"),
            lambda: gallery.enrol("nut", [pictures / f"bolt/{k}.png" for k in range(3)]),
        )
    )

    def embed_while_others_work(images: np.ndarray) -> np.ndarray:
        for step in renamed:  # in the first batch only
            step()
        return embed(images)

    monkeypatch.setattr(other, "embed", embed_while_others_work)
    with pytest.raises(BusyError, match="changed while"):
        reembed(gallery.store.folder, other)
    assert gallery.identify(pictures / "bolt/3.png").damaged == 0


def test_export(gallery: Gallery, tmp_path: Path, verifier: OnnxVerifier) -> None:
    gallery.remove("bolt")
    assert export_gallery(gallery.store.folder, tmp_path / "out") == 9
    vectors = np.load(tmp_path / "out/embeddings.npy", allow_pickle=False)
    rows = (tmp_path / "out/gallery.csv").read_text().splitlines()
    assert rows[0] == "row,name,source,sha256,enrolled_utc"
    for line in rows[1:]:
        row, name, source, *_ = line.split(",")
        assert Path(source).parent.name == name
        image = np.stack([np.asarray(Image.open(source))])
        assert image.size
        score = verifier.score(vectors[int(row)][None], vectors[int(row)][None])[0]
        assert score == verifier.compare(source, source)
    with pytest.raises(UsageError, match="exists already"):
        export_gallery(gallery.store.folder, tmp_path / "out")


def test_what_is_no_gallery_stays_as_it_is(tmp_path: Path, verifier: OnnxVerifier, gallery: Gallery) -> None:
    with pytest.raises(InputDataError, match="is no gallery"):
        Gallery(tmp_path / "nowhere", verifier)
    assert not (tmp_path / "nowhere").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    sqlite3.connect(foreign / DATABASE).execute("CREATE TABLE theirs (x)").connection.close()
    (tmp_path / "text").mkdir(mode=0o700)
    (tmp_path / "text" / DATABASE).write_text("not a database, whatever its name says" * 100)
    for folder, words in ((foreign, "is another program's database"), (tmp_path / "text", "no gallery")):
        before = (folder / DATABASE).read_bytes()
        for create in (False, True):
            with pytest.raises(IntegrityError, match=words):
                Gallery(folder, verifier, create=create)
        assert (folder / DATABASE).read_bytes() == before
    database = sqlite3.connect(gallery.store.folder / DATABASE)
    database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(IntegrityError, match="format 2"):
        Gallery(gallery.store.folder, verifier)


def test_a_second_name_of_the_database_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    os.link(gallery.store.folder / DATABASE, tmp_path / "copy")
    with pytest.raises(IntegrityError, match="hard link"):
        Gallery(gallery.store.folder, gallery.verifier)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_vector_file_that_is_no_file(gallery: Gallery, pictures: Path, tmp_path: Path, kind: str) -> None:
    file = vectors_file(gallery)
    file.rename(tmp_path / "moved")
    file.mkdir() if kind == "folder" else file.symlink_to(tmp_path / "moved")
    with pytest.raises(IntegrityError, match="expected a plain file"):
        gallery.identify(pictures / "apple/0.png")


def test_one_flipped_bit_of_the_database(gallery: Gallery, pictures: Path) -> None:
    """Anywhere in it: the same answer, rows left out and told, or refused; never another answer, never a traceback."""
    path = gallery.store.folder / DATABASE
    whole = path.read_bytes()
    expected = gallery.identify(pictures / "apple/0.png", top=9)
    for position in random.Random(1).sample(range(8 * len(whole)), 60):  # noqa: S311
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            opened = Gallery(gallery.store.folder, gallery.verifier)
            found = opened.identify(pictures / "apple/0.png", top=9)
            opened.store.pictures()
        except (IntegrityError, BusyError, EnvironmentFault):
            continue
        assert found == expected or found.damaged > 0, position


def test_private(gallery: Gallery) -> None:
    assert gallery.store.folder.stat().st_mode & 0o777 == 0o700
    for path in gallery.store.folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_vectors_that_are_not_finite_are_never_stored(gallery: Gallery) -> None:
    vectors = np.zeros((1, gallery.verifier.embedding_dim), np.float32)
    vectors[0, 3] = np.nan
    with pytest.raises(IntegrityError, match="not finite"):
        gallery.store.enrol([Group("x", [StoredPicture("x", b"\0" * 32, "")], vectors)])
    assert gallery.store.pictures("x") == []


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "\x1b[2J", " padded", "lone\udc80"])
def test_names(gallery: Gallery, pictures: Path, name: str) -> None:
    with pytest.raises(UsageError, match="printable characters"):
        gallery.enrol(name, [pictures / "apple/3.png"])


def test_twins() -> None:
    composed, apart = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")
    assert twins(["alice", "bob", composed, "Alice", apart]) == [("alice", "Alice"), (composed, apart)]


def test_cached_and_fresh_answers_are_equal(
    gallery: Gallery, tiny_bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    cache = EmbeddingCache(tmp_path / "cache")
    cached = Gallery(gallery.store.folder, OnnxVerifier(tiny_bundle, provider="cpu", cache=cache))
    answers = [cached.identify(pictures / "cog/3.png") for _ in range(2)]
    assert (cache.hits, cache.misses) == (1, 1)
    assert answers == [gallery.identify(pictures / "cog/3.png")] * 2


def test_rows_that_stay_on_the_device_answer_alike(gallery: Gallery, pictures: Path) -> None:
    """As on a GPU, with the CPU as the device: some rows stay there, the others are sent."""
    probe = pictures / "cog/3.png"
    few = 4 * gallery.verifier.embedding_dim * 5
    for device_bytes in (few, 2**20):
        resident = Gallery(gallery.store.folder, gallery.verifier)
        resident._device_bytes = device_bytes  # the constructor leaves the CPU without
        for change in (lambda: None, lambda: gallery.remove("bolt"), lambda: gallery.enrol("bolt", [probe], add=True)):
            change()
            assert resident.identify(probe, top=9) == resident.identify(probe, top=9) == gallery.identify(probe, top=9)
            for name in ("apple", "cog"):
                assert resident.verify(probe, name) == gallery.verify(probe, name)
    with open(vectors_file(gallery), "r+b") as file:
        file.write(b"\xff" * 8)
    resident = Gallery(gallery.store.folder, gallery.verifier)
    resident._device_bytes = few
    assert resident.identify(probe, top=9) == gallery.identify(probe, top=9)
    assert resident.identify(probe).damaged == 1


def test_threads_share_one_gallery(gallery: Gallery, pictures: Path) -> None:
    expected = {name: gallery.identify(pictures / name / "3.png", top=9) for name in CLASSES}
    with ThreadPoolExecutor(8) as threads:
        jobs = [(name, threads.submit(gallery.identify, pictures / name / "3.png", top=9)) for name in CLASSES * 4]
        for name, job in jobs:
            assert job.result() == expected[name]


def test_what_a_file_of_vectors_does_not_have_is_zero(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(np.arange(1, 6, dtype="<f4").tobytes())
    for name, expected in (("a", [3, 4, 5, 0]), ("none", [0, 0, 0, 0])):
        into = np.ones((2, 2), np.float32)
        with VectorFile(tmp_path / name, 2) as file:
            file.read(1, into)
        assert into.ravel().tolist() == expected


def test_a_file_of_vectors_where_standard_input_was(tmp_path: Path) -> None:
    """A service may run without; the next file that is opened then has its descriptor, 0."""
    (tmp_path / "a").write_bytes(np.arange(4, dtype="<f4").tobytes())
    code = (
        "import os, pathlib, sys, numpy as np; from siamese_deploy.gallery.vectors import VectorFile\n"
        "into = np.ones((2, 2), np.float32); os.close(0)\n"
        "with VectorFile(pathlib.Path(sys.argv[1]), 2) as file: file.read(0, into)\n"
        "print(into.ravel().tolist(), os.path.exists('/proc/self/fd/0'))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert done.stdout == "[0.0, 1.0, 2.0, 3.0] False\n", done.stderr


def test_checksums_stay_what_is_on_the_disk_of_users() -> None:
    for dim, expected in (
        (3, [12488355042702655488, 2660752237585760256]),
        (4, [3816762270013194240, 8270348303296626688]),
    ):
        assert checksums(np.arange(1, 2 * dim + 1, dtype=np.float32).reshape(2, dim)).tolist() == expected


@pytest.mark.parametrize("dim", [7, 8])
def test_a_checksum_finds_every_changed_sign(dim: int) -> None:
    """The highest bit of a word, which a product with an even number would lose."""
    one_sign_each = np.ones((dim, dim), np.float32)
    np.fill_diagonal(one_sign_each, -1)
    (of_ones,) = checksums(np.ones((1, dim), np.float32))
    assert not (checksums(one_sign_each) == of_ones).any()


@given(st.integers(1, 6), st.integers(1, 33), st.data())
def test_a_checksum_finds_every_changed_word(n: int, dim: int, data: st.DataObject) -> None:
    vectors = np.random.RandomState(n * 100 + dim).standard_normal((n, dim)).astype(np.float32)
    row, column = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, dim - 1))
    bit = data.draw(st.integers(0, 31))
    changed = vectors.copy()
    changed.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
    different = checksums(vectors) != checksums(changed)
    assert different.tolist() == [k == row for k in range(n)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(st.tuples(st.sampled_from("ar"), st.integers(0, 5), st.integers(1, 3)), max_size=12))
def test_the_store_holds_what_a_dictionary_would(
    operations: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = GalleryStore.create(tmp_path_factory.mktemp("store") / "gallery", "digest", 3)
    model: dict[str, list[float]] = {}
    for number, (operation, who, count) in enumerate(operations):
        name = f"id{who}"
        if operation == "a":
            values = [float(number * 10 + k) for k in range(count)]
            stored = [StoredPicture(name, f"{number} {k}".encode().ljust(32), "") for k in range(count)]
            store.enrol([Group(name, stored, np.repeat(np.array(values, np.float32)[:, None], 3, axis=1))], add=True)
            model.setdefault(name, []).extend(values)
        elif name in model:
            store.remove([name])
            del model[name]
        else:
            with pytest.raises(InputDataError):
                store.remove([name])
    found: dict[str, list[float]] = {}
    with store.snapshot() as snapshot:
        assert snapshot.rows.damaged == 0
        for row, vectors in snapshot.sound_vectors():
            for k, vector in zip(row, vectors, strict=True):
                found.setdefault(snapshot.rows.names[snapshot.rows.identities[k]], []).append(float(vector[0]))
    assert {name: sorted(values) for name, values in found.items()} == {n: sorted(v) for n, v in model.items()}
