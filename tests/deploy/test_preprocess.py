from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from siamese_deploy.errors import ImageError
from siamese_deploy.preprocess import MAX_FILE_BYTES, Preprocess, decode_image, load_image, resize_image

RED, GREEN = (200, 30, 40), (20, 160, 60)


def two_halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "jpg", "webp", "gif"])
def test_every_format_comes_out_as_rgb_of_the_asked_size(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"picture.{extension}"
    two_halves().save(path, **({"quality": 95, "subsampling": 0} if extension == "jpg" else {}))
    pixels = load_image(path, Preprocess((12, 30)))
    assert pixels.shape == (12, 30, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[6, 4].astype(int) - RED).max() <= 6
    assert np.abs(pixels[6, 26].astype(int) - GREEN).max() <= 6


def test_content_decides_not_the_extension(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert decode_image(tmp_path / "a.jpg").size == (40, 20)


def test_resize_is_bilinear_with_antialiasing() -> None:
    # One white column in eight: without antialiasing a shrunk picture would hit or miss it.
    pixels = np.zeros((8, 64, 3), np.uint8)
    pixels[:, ::8] = 255
    small = resize_image(Image.fromarray(pixels), (1, 8))
    assert small[0, 1:-1, 0] == pytest.approx(32, abs=3)
    # Enlarging is plain linear interpolation between pixel centres.
    assert resize_image(Image.fromarray(pixels[:, :2]), (8, 4))[0, :, 0].tolist() == [255, 191, 64, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = two_halves()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(decode_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    two_halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode_image(tmp_path / "a.jpg").size == (40, 20)


def test_transparency_shows_grey_and_not_the_hidden_colour(tmp_path: Path) -> None:
    image = Image.new("RGBA", (20, 20), (*RED, 0))
    image.paste((*GREEN, 255), (0, 0, 10, 20))
    image.putpixel((15, 10), (255, 255, 255, 128))
    image.save(tmp_path / "rgba.png")
    pixels = np.asarray(decode_image(tmp_path / "rgba.png"))
    assert pixels[10, 5].tolist() == list(GREEN)
    assert pixels[10, 19].tolist() == [128, 128, 128]
    assert pixels[10, 15] == pytest.approx(192, abs=1)

    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([*RED, *GREEN])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(decode_image(tmp_path / "palette.png"))[0, 0].tolist() == [128, 128, 128]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    for name in ("deep.png", "deep.tiff"):
        pixels = np.asarray(decode_image(tmp_path / name))
        assert np.array_equal(pixels[..., 1], values // 257)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.png" if mode in ("1", "L", "LA", "P") else "a.tiff")
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    assert np.asarray(decode_image(path)).min() >= 250


@pytest.mark.parametrize("mode", ["LA", "P", "I;16", "CMYK", "RGBA"])
def test_a_large_picture_is_converted_as_its_parts_are(mode: str) -> None:
    random = np.random.RandomState(0)
    if mode == "I;16":
        image = Image.fromarray(random.randint(0, 2**16, (1500, 1700)).astype(np.uint16))
    else:
        image = Image.fromarray(random.randint(0, 256, (1500, 1700, 4)).astype(np.uint8), "RGBA")
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    box = (0, 500, 1700, 720)  # small enough to be converted at once, and across a border of the large one's strips
    assert decode_image(image).crop(box).tobytes() == decode_image(image.crop(box)).tobytes()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(decode_image(tmp_path / "a.gif"))[0, 0].astype(int) - RED).max() <= 4


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT"


def jpeg_bytes() -> bytes:
    buffer = BytesIO()
    two_halves((200, 100)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"not a picture at all", "not a picture"),
        (b"  <!DOCTYPE html><html>404", "looks like an HTML page"),
        (jpeg_bytes()[:900], "damaged or truncated"),
        (png_header(20, 20) + b"junk", "damaged or truncated"),
        (png_header(100_000, 100_000), "too large"),
        (png_header(8_000, 8_000), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_unusable_files_give_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as error:
        decode_image(path)
    assert str(path) in str(error.value)


def saved(side: int, format_name: str, mode: str = "L", **options: object) -> bytes:
    buffer = BytesIO()
    Image.new(mode, (side, side)).save(buffer, format_name, **options)
    return buffer.getvalue()


def run_length_bmp(side: int) -> bytes:
    info = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    rows = (b"\xff\1" * (side // 255 + 1) + b"\0\0") * side
    return struct.pack("<2sLLL", b"BM", 1078 + len(rows), 0, 1078) + info + bytes(1024) + rows


def jpeg_in_scans(side: int) -> bytes:
    """The header of a sequential JPEG that has a scan for each colour."""
    frame = struct.pack(">HHBHHB", 0xFFC0, 17, 8, side, side, 3) + bytes([0, 17, 0, 1, 17, 0, 2, 17, 0])
    return b"\xff\xd8" + frame + struct.pack(">HHBBBBBB", 0xFFDA, 8, 1, 0, 0, 0, 63, 0)


def test_files_that_take_more_to_decode_may_have_fewer_pixels() -> None:
    progressive = saved(5001, "JPEG", progressive=True)
    for content, most in (
        (saved(5001, "WEBP", lossless=True, method=0, quality=0), "25,000,000"),
        (progressive, "25,000,000"),
        (jpeg_in_scans(5001), "25,000,000"),
        (saved(5001, "TIFF", "LAB", compression="tiff_adobe_deflate"), "25,000,000"),
        (run_length_bmp(1001), "1,000,000"),
    ):
        with pytest.raises(
            ImageError, match=f"too large: .* pixels, at most {most} are accepted in this kind"
        ) as error:
            decode_image(content)
        assert error.value.code == "picture-too-large"
    assert decode_image(saved(5001, "JPEG")).size == (5001, 5001)
    assert decode_image(run_length_bmp(1000)).size == (1000, 1000)
    # Decoded already, it is as any other.
    with Image.open(BytesIO(progressive)) as image:
        assert decode_image(image).size == (5001, 5001)


def test_refuses_what_is_no_plain_file_or_has_no_pixels_to_speak_of(tmp_path: Path) -> None:
    Image.new("RGB", (3, 200)).save(tmp_path / "thin.png")
    Image.new("F", (20, 20)).save(tmp_path / "float.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for name, reason in {
        "thin.png": "too small",
        "float.tiff": "no defined range",
        "pipe.png": "not a regular file",
        "huge.png": "too large",
        "absent.png": "cannot be opened",
    }.items():
        with pytest.raises(ImageError, match=reason):
            decode_image(tmp_path / name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=8), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_never_anything_else(
    tmp_path: Path, where: int, junk: bytes, cut: bool
) -> None:
    data = jpeg_bytes()
    where %= len(data)
    path = tmp_path / "fuzz.jpg"
    path.write_bytes(data[:where] + junk + (b"" if cut else data[where + len(junk) :]))
    try:
        assert load_image(path, Preprocess((8, 8))).shape == (8, 8, 3)
    except ImageError:
        pass
