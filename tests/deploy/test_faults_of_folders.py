"""Folders of pictures as they are found: odd formats, names and rights, and what changes while it is read.

What one file alone does is in test_preprocess.py, what `siamese check` says of it in test_dataset_check.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand, assert_refused, write_files
from PIL import Image, ImageCms
from planted_faults import encoded

from siamese_deploy import OnnxVerifier
from siamese_deploy.cli import main as siamese
from siamese_deploy.embedding import embed_images
from siamese_deploy.errors import EnvironmentFault
from siamese_deploy.evaluate import evaluate_pairs
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.preprocess import decode_image

SIAMESE = (sys.executable, "-c", "from siamese_deploy.cli import main; main()")


def without_roots_powers() -> None:
    """Permissions count for root, too."""
    import ctypes

    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def as_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*SIAMESE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=without_roots_powers)


# --- formats -------------------------------------------------------------------------------------------------------


def test_inks_become_the_colours_they_print() -> None:
    inks = Image.new("CMYK", (40, 40), (0, 220, 200, 10))
    expected = [(255 - ink) * (255 - 10) / 255 for ink in (0, 220, 200)]
    for format, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        pixels = np.asarray(decode_image(encoded(inks, format, **options)))
        assert np.abs(pixels - expected).max() <= 2, format
    # The same file called YCCK: of its four numbers, which are 255 minus ink, three are luma and chroma.
    data = encoded(Image.new("CMYK", (40, 40), (100, 90, 170, 30)), "JPEG", quality=100)
    at = data.find(b"Adobe") + 11
    luma, blue, red = 255 - 100, 255 - 90 - 128, 255 - 170 - 128
    rgb = [luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue]
    pixels = np.asarray(decode_image(data[:at] + b"\2" + data[at + 1 :]))
    assert np.abs(pixels - [(255 - ink) * (255 - 30) / 255 for ink in rgb]).max() <= 2


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    first, second = (Image.new("RGB", (40, 40), colour) for colour in ((200, 30, 40), (20, 160, 60)))
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **lossless)
    with Image.open(io.BytesIO(data)) as whole:
        assert whole.n_frames == 2  # type: ignore[attr-defined]
    assert np.abs(np.asarray(decode_image(data)).astype(int) - (200, 30, 40)).max() <= 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("profile", ["of another colour space", "damaged"])
def test_colour_profiles_change_nothing(format: str, profile: str) -> None:
    icc = b"no profile" if profile == "damaged" else ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * k) for k in range(3)])
    with_profile = encoded(image, format, icc_profile=icc)
    with Image.open(io.BytesIO(with_profile)) as whole:
        assert whole.info["icc_profile"] == icc
    assert decode_image(with_profile).tobytes() == decode_image(encoded(image, format)).tobytes()


# --- classes and names ---------------------------------------------------------------------------------------------


def test_small_classes_give_different_pairs_and_empty_ones_none(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    picture = (pictures / "apple/0.png").read_bytes()
    write_files(pictures, {"single/0.png": picture + b"\0", "unread/0.png": b"", "unread/1.png": b""})
    (pictures / "void").mkdir()
    result = run(siamese, "eval", "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert result.exit_code == 0, result.output
    with open(tmp_path / "out/pairs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "single/0.png" in (row["left"], row["right"])]
    assert rows
    assert {row["is_same"] for row in rows} == {"0"}
    with open(tmp_path / "out/skipped.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {"unread/0.png", "unread/1.png", "void"}
    assert "one picture (1)" in result.stderr
    assert "without" in result.stderr or "empty" in result.stderr


def test_names_are_only_names(run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    classes = {"apple": "-rf", "bolt": "new\nline\t", "cog": "\u202egnp", "door": "\N{GRINNING FACE}" * 63}  # 252 bytes
    for old, new in classes.items():
        (pictures / old).rename(pictures / new)
        (pictures / new / "0.png").rename(pictures / new / ("n" * 251 + ".png"))
    result = run(siamese, "eval", "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in (result.stdout + result.stderr).splitlines())
    assert json.loads((tmp_path / "out/metrics.json").read_text())["pairs"] == 16
    again = run(
        siamese, "eval", "-v", pictures, "-o", tmp_path / "b", "-c", tiny_bundle, "--pairs", tmp_path / "out/pairs.csv"
    )
    assert again.exit_code == 0, again.output
    unreadable = pictures / classes["bolt"] / "1.png"
    unreadable.write_bytes(b"no picture")
    assert_refused(run(siamese, "verify", unreadable, unreadable, "-c", tiny_bundle), 3, "new\\nline\\t/1.png")


def test_a_path_longer_than_the_system_takes_at_once(pictures: Path, tmp_path: Path) -> None:
    code = (
        "import os, shutil, sys\n"
        "source = sys.argv.pop(1)\n"
        "for _ in range(25):\n"
        "    os.mkdir('x' * 200); os.chdir('x' * 200)\n"
        "shutil.copytree(source, 'pictures')\n"
        "from siamese_deploy.cli import main; main()"
    )
    for folder, exit_code, words in (
        ("pictures", 0, "16 of 16 pictures usable"),
        ("y" * 5000, 2, "File name too long"),
    ):
        (tmp_path / folder[0]).mkdir()
        command = [sys.executable, "-c", code, str(pictures), "check", folder]
        done = subprocess.run(command, cwd=tmp_path / folder[0], capture_output=True, text=True)
        assert done.returncode == exit_code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", ["/dev/zero", "a folder"])
def test_what_is_no_file_is_never_opened(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path, target: str
) -> None:
    (pictures / "bolt/9.png").symlink_to(target if target.startswith("/") else pictures / "cog")
    (pictures / "bolt/gone.png").symlink_to(tmp_path / "nowhere")
    folder = scan_image_folder(pictures)
    assert {(file.path, file.reason) for file in folder.skipped} == {
        ("bolt/9.png", "not a regular file"),
        ("bolt/gone.png", "broken link"),
    }
    picture = pictures / "apple/0.png"
    result = run(siamese, "verify", pictures / "bolt/9.png", picture, "-c", tiny_bundle, "--threshold", 0)
    assert_refused(result, 3, "bolt/9.png: not a regular file")


# --- rights --------------------------------------------------------------------------------------------------------


def test_what_may_not_be_read_is_listed(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (pictures / "apple/0.png").chmod(0)
    (pictures / "bolt").chmod(0)
    evaluate = ("eval", "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle, "--no_cache")
    try:
        done = as_user(*evaluate)
        strict = as_user(*evaluate, "--strict")
        pictures.chmod(0)
        root = as_user(*evaluate)
    finally:
        pictures.chmod(0o700)
        (pictures / "bolt").chmod(0o700)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/skipped.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"apple/0.png", "bolt"}
    assert all("Permission denied" in reason for reason in reasons.values())
    assert "skipped 2 files" in done.stderr
    assert (strict.returncode, root.returncode) == (3, 5)
    assert "--strict allows none" in strict.stderr
    assert "no permission to read this folder" in root.stderr


def test_nothing_is_written_into_a_data_set(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    inside = [pictures, *pictures.rglob("*")]
    for path in inside:
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = {path: path.stat().st_mtime_ns for path in inside}
    runs = [
        ("eval", "-v", pictures, "-o", tmp_path / "out", "-c", tiny_bundle),
        ("check", pictures, "-o", tmp_path / "findings"),
        ("gallery", "enrol", tmp_path / "gallery", pictures, "-c", tiny_bundle),
    ]
    try:
        for arguments in runs:
            done = as_user(*arguments)
            assert done.returncode == 0, done.stderr
    finally:
        for path in inside:
            path.chmod(0o700)
    assert {path: path.stat().st_mtime_ns for path in [pictures, *pictures.rglob("*")]} == before


# --- while it is read ----------------------------------------------------------------------------------------------


def test_what_goes_away_or_changes_during_the_run(pictures: Path, tiny_bundle: Path) -> None:
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    folder = scan_image_folder(pictures)
    before = embed_images(verifier, folder, np.arange(16))
    (pictures / "apple/0.png").unlink()
    (pictures / "bolt/1.png").write_bytes((pictures / "bolt/1.png").read_bytes()[:300])
    shutil.copy(pictures / "cog/2.png", pictures / "door/3.png")
    evaluation = evaluate_pairs(verifier, folder, sample_pairs(folder))
    assert {file.path for file in evaluation.skipped} == {"apple/0.png", "bolt/1.png"}
    assert evaluation.pairs_skipped >= 2
    assert len(evaluation.pairs) + evaluation.pairs_skipped == 16
    after = embed_images(verifier, folder, np.arange(16))
    changed, copied = (folder.paths.index(path) for path in ("door/3.png", "cog/2.png"))
    row = after.vectors[after.row_of_image[changed]]
    assert np.array_equal(row, after.vectors[after.row_of_image[copied]])
    assert not np.array_equal(row, before.vectors[before.row_of_image[changed]])


@pytest.mark.parametrize("left", ["nothing", "mount point"])
def test_where_the_whole_disk_goes_away_nothing_is_made_of_the_rest(
    pictures: Path, tiny_bundle: Path, left: str
) -> None:
    picture = (pictures / "apple/0.png").read_bytes()
    write_files(pictures, {f"apple/more{k}.png": picture for k in range(200)})
    folder = scan_image_folder(pictures)

    def unplug(_so_far: object, _done: int) -> None:
        if not pictures.with_name("unplugged").exists():
            pictures.rename(pictures.with_name("unplugged"))
            if left == "mount point":
                pictures.mkdir()

    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    with pytest.raises(EnvironmentFault, match="its folders are gone"):
        embed_images(verifier, folder, np.arange(len(folder)), after_batch=unplug)


# --- very many -----------------------------------------------------------------------------------------------------


def many(root: Path, count: int) -> Path:
    (root / "one").mkdir(parents=True)
    for k in range(count):
        os.close(os.open(root / f"one/{k:07}.png", os.O_CREAT | os.O_WRONLY))
    return root


def test_a_million_names_take_a_few_hundred_bytes_each(tmp_path: Path) -> None:
    """SIAMESE_FILES=1000000 for as many."""
    count = int(os.environ.get("SIAMESE_FILES", "10000"))
    root = many(tmp_path / "many", count)
    tracemalloc.start()
    try:
        folder = scan_image_folder(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(folder) == count
    assert peak / count < 1000


@pytest.mark.slow
def test_very_many_files_are_left_within_a_second_of_ctrl_c(tmp_path: Path) -> None:
    root = many(tmp_path / "many", 200_000)
    for seconds in (0.5, 1.0, 2.0):
        child = subprocess.Popen([*SIAMESE, "check", str(root)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        if child.poll() is not None:
            continue
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
        assert time.monotonic() - sent < 5  # one second on an idle machine
        assert child.returncode in (130, -signal.SIGINT), stderr
