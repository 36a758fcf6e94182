"""A folder for each row A1 to A37 of the catalogue of data set faults that `siamese check` can see."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from siamese_deploy.demo_data import draw_character

_PNG = b"\x89PNG\r\n\x1a\n"


def drawing(character: int, drawer: int = 0, side: int = 48) -> Image.Image:
    return draw_character(character, drawer).resize((side, side + 8)).convert("RGB")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def clean_folder(root: Path) -> Path:
    """Four classes of four pictures in which there is nothing to find."""
    for k, name in enumerate(("apple", "bolt", "cog", "door")):
        (root / name).mkdir(parents=True)
        for n in range(4):
            (root / name / f"{n}.png").write_bytes(encoded(drawing(100 + 4 * k + n), "PNG"))
    return root


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def exif_block(orientation: int, *, entries: int = 1) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<LHHHLHHL", 8, entries, 0x0112, 3, 1, orientation, 0, 0)


@dataclass(frozen=True)
class Fault:
    row: str
    codes: frozenset[str]
    """All kinds of findings that the check must give, and no other."""
    path: str
    """Relative path that one of the findings of the first code names; empty: none is asked for."""
    plant: Callable[[Path], object]


FAULTS: dict[str, Fault] = {}


def fault(row: str, codes: str, path: str = "") -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def register(plant: Callable[[Path], object]) -> Callable[[Path], object]:
        name = f"{row}-{plant.__name__.strip('_')}"
        FAULTS[name] = Fault(row, frozenset(codes.split()), path, plant)
        return plant

    return register


def planted_bytes(row: str, codes: str, path: str, data: Callable[[], bytes]) -> None:
    FAULTS[f"{row}-{path}"] = Fault(row, frozenset(codes.split()), path, lambda root: (root / path).write_bytes(data()))


@fault("A3", "in-root", "lost.png")
def _beside_the_classes(root: Path) -> None:
    (root / "lost.png").write_bytes(encoded(drawing(9), "PNG"))


@fault("A3", "too-deep", "apple/more")
def _below_a_class(root: Path) -> None:
    (root / "apple/more").mkdir()
    (root / "apple/more/1.png").write_bytes(encoded(drawing(9), "PNG"))


@fault("A4", "one-class")
def _one_class(root: Path) -> None:
    for name in ("bolt", "cog", "door"):
        shutil.rmtree(root / name)


@fault("A5", "one-picture", "single")
def _one_picture(root: Path) -> None:
    (root / "single").mkdir()
    (root / "single/1.png").write_bytes(encoded(drawing(9), "PNG"))


@fault("A5", "no-class-of-two one-picture")
def _no_class_of_two(root: Path) -> None:
    for name in ("apple", "bolt", "cog", "door"):
        for k in (1, 2, 3):
            (root / name / f"{k}.png").unlink()


@fault("A6", "empty-class", "void")
def _no_file(root: Path) -> None:
    (root / "void").mkdir()


@fault("A6", "empty-class unreadable", "void")
def _no_usable_file(root: Path) -> None:
    (root / "void").mkdir()
    (root / "void/1.png").touch()


@fault("A7", "imbalance")
def _imbalance(root: Path) -> None:
    for k in range(40):
        (root / f"apple/more{k}.png").write_bytes(encoded(drawing(k + 20), "PNG"))


def cut_jpeg() -> bytes:
    data = encoded(drawing(9), "JPEG")
    return data[: len(data) // 2]


def bomb() -> bytes:
    header = struct.pack(">LLBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return _PNG + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


planted_bytes("A8", "unreadable", "apple/zero.png", lambda: b"")
planted_bytes("A9", "unreadable", "apple/cut.jpg", cut_jpeg)
planted_bytes("A10", "unreadable", "apple/text.jpg", lambda: b"this is not a picture\n" * 20)
planted_bytes("A10", "unreadable", "apple/page.jpg", lambda: b"<!DOCTYPE html><html><body>404")
planted_bytes("A10", "unreadable", "apple/zip.jpg", lambda: b"PK\x03\x04" + bytes(100))
planted_bytes("A10", "unreadable", "apple/film.jpg", lambda: b"\0\0\0\x18ftypmp42" + bytes(100))
planted_bytes("A11", "wrong-extension", "apple/really-png.jpg", lambda: encoded(drawing(9), "PNG"))
planted_bytes("A12", "unknown-extension", "apple/none", lambda: encoded(drawing(9), "PNG"))
planted_bytes("A12", "unknown-extension", "apple/x.jfif", lambda: encoded(drawing(9), "JPEG"))
planted_bytes("A13", "unreadable", "apple/bomb.png", bomb)
planted_bytes("A15", "unreadable", "apple/dot.png", lambda: encoded(drawing(9).resize((1, 1)), "PNG"))
planted_bytes("A15", "unreadable", "apple/line.png", lambda: encoded(drawing(9).resize((1, 60)), "PNG"))
planted_bytes("A15", "tiny", "apple/small.png", lambda: encoded(drawing(9).resize((12, 60)), "PNG"))
planted_bytes("A18", "unreadable", "apple/float.tiff", lambda: encoded(Image.new("F", (40, 40), 0.5), "TIFF"))
planted_bytes("A21", "exif", "apple/turned9.jpg", lambda: encoded(drawing(9), "JPEG", exif=exif_block(9)))
planted_bytes("A21", "exif", "apple/short.jpg", lambda: encoded(drawing(9), "JPEG", exif=exif_block(6, entries=9)))
planted_bytes("A21", "exif", "apple/no-exif.jpg", lambda: encoded(drawing(9), "JPEG", exif=b"Exif\0\0nonsense"))
planted_bytes("A22", "unsupported-format", "apple/a.heic", lambda: b"\0\0\0\x18ftypheic" + bytes(100))
planted_bytes("A22", "unsupported-format", "apple/a.eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n")
planted_bytes("A22", "unsupported-format", "apple/a.pdf", lambda: b"%PDF-1.7\n")
planted_bytes("A22", "unsupported-format", "apple/a.psd", lambda: b"8BPS\0\1" + bytes(100))
planted_bytes("A22", "unsupported-format", "apple/a.fits", lambda: b"SIMPLE  =                    T")
planted_bytes("A22", "unsupported-format", "apple/a.dds", lambda: b"DDS \x7c" + bytes(100))
planted_bytes("A22", "unsupported-format", "apple/a.svg", lambda: b'<?xml version="1.0"?>\n<svg width="9">')
planted_bytes("A22", "unreadable", "apple/heic.jpg", lambda: b"\0\0\0\x18ftypheic" + bytes(100))
planted_bytes("A22", "unreadable", "apple/eps.png", lambda: encoded(drawing(9), "EPS"))
planted_bytes("flat", "flat", "apple/white.png", lambda: encoded(Image.new("RGB", (64, 64), "white"), "PNG"))


@fault("A14", "unreadable", "apple/huge.png")
def _more_bytes_than_are_read(root: Path) -> None:
    with open(root / "apple/huge.png", "wb") as file:
        file.truncate(65 * 2**20)  # a hole: takes no space


@fault("A20", "multi-frame", "apple/film.gif")
def _animation(root: Path) -> None:
    drawing(9).save(root / "apple/film.gif", save_all=True, append_images=[drawing(10), drawing(11)])


@fault("A20", "multi-frame", "apple/pages.tiff")
def _pages(root: Path) -> None:
    drawing(9).save(root / "apple/pages.tiff", save_all=True, append_images=[drawing(10)])


@fault("A24", "unreadable", "apple/talkative.png")
def _megabytes_of_text(root: Path) -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))
    data = encoded(drawing(9), "PNG")
    (root / "apple/talkative.png").write_bytes(data[:33] + text + data[33:])


@fault("A25", "hidden", "apple/._0.png")
def _left_behind(root: Path) -> None:
    for name in ("apple/._0.png", ".DS_Store", "bolt/Thumbs.db", "@eaDir/1.png", "__MACOSX/apple/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0")


@fault("A26", "label-conflict", "apple/again.png")
def _link_to_another_class(root: Path) -> None:
    (root / "apple/again.png").symlink_to(root / "bolt/0.png")


@fault("A26", "duplicate", "apple/again.png")
def _link_within_a_class(root: Path) -> None:
    (root / "apple/again.png").symlink_to("0.png")


@fault("A26", "label-conflict", "apple/0.png")
def _linked_class(root: Path) -> None:
    (root / "appletwo").symlink_to("apple")


@fault("A27", "broken-link", "apple/gone.png")
def _broken_link(root: Path) -> None:
    (root / "apple/gone.png").symlink_to("nowhere.png")


@fault("A27", "broken-link", "apple/loop.png")
def _link_to_itself(root: Path) -> None:
    (root / "apple/loop.png").symlink_to("loop.png")


@fault("A27", "link-loop", "apple/up")
def _link_upwards(root: Path) -> None:
    (root / "apple/up").symlink_to("..")


@fault("A27", "link-outside", "apple/out.png")
def _link_to_a_file_outside(root: Path) -> None:
    (root.parent / "elsewhere.png").write_bytes(encoded(drawing(9), "PNG"))
    (root / "apple/out.png").symlink_to(root.parent / "elsewhere.png")


@fault("A27", "link-outside", "out")
def _link_to_a_class_outside(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    for k in (9, 10):
        (root.parent / f"elsewhere/{k}.png").write_bytes(encoded(drawing(k), "PNG"))
    (root / "out").symlink_to(root.parent / "elsewhere")


@fault("A27", "link-outside", "apple/out")
def _link_to_a_folder_outside_from_within_a_class(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root.parent / "elsewhere/1.png").write_bytes(encoded(drawing(9), "PNG"))
    (root / "apple/out").symlink_to(root.parent / "elsewhere")


@fault("A28", "not-a-file", "apple/pipe.png")
def _pipe(root: Path) -> None:
    os.mkfifo(root / "apple/pipe.png")


@fault("A28", "not-a-file", "pipe.jpg")
def _pipe_beside_the_classes(root: Path) -> None:
    os.mkfifo(root / "pipe.jpg")


@fault("A28", "not-a-file", "apple/s.png")
def _socket(root: Path) -> None:
    before = os.getcwd()
    os.chdir(root)  # the path of a socket may have 108 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("apple/s.png")
    finally:
        os.chdir(before)


@fault("A29", "odd-name", os.fsdecode(b"apple/caf\xe9.png"))
def _not_utf8(root: Path) -> None:
    (root / os.fsdecode(b"apple/caf\xe9.png")).write_bytes(encoded(drawing(9), "PNG"))


@fault("A30", "odd-name", "apple/new\nline\x1b[31m.png")
def _control_characters(root: Path) -> None:
    (root / "apple/new\nline\x1b[31m.png").write_bytes(encoded(drawing(9), "PNG"))


@fault("A30", "odd-name", "apple/\u202egnp.exe.png")
def _right_to_left(root: Path) -> None:
    (root / "apple/\u202egnp.exe.png").write_bytes(encoded(drawing(9), "PNG"))


@fault("A30", "odd-name", "apple/-rf.png")
def _leading_dash(root: Path) -> None:
    (root / "apple/-rf.png").write_bytes(encoded(drawing(9), "PNG"))


def _twin(root: Path, name: str) -> None:
    (root / name).mkdir()
    for k in (9, 10):
        (root / name / f"{k}.png").write_bytes(encoded(drawing(k), "PNG"))


@fault("A31", "class-twins", "Apple")
def _case(root: Path) -> None:
    _twin(root, "Apple")


@fault("A31", "class-twins", "cafe\u0301")
def _unicode_form(root: Path) -> None:
    (root / "bolt").rename(root / "caf\u00e9")
    _twin(root, "cafe\u0301")


@fault("A31", "class-twins", "apple ")
def _blank_at_the_end(root: Path) -> None:
    _twin(root, "apple ")


@fault("A32", "label-conflict", "bolt/copy.png")
def _same_file_in_two_classes(root: Path) -> None:
    shutil.copy(root / "apple/0.png", root / "bolt/copy.png")


@fault("A32", "label-conflict", "bolt/copy.bmp")
def _same_pixels_in_two_classes(root: Path) -> None:
    Image.open(root / "apple/0.png").convert("RGB").save(root / "bolt/copy.bmp")


@fault("A33", "duplicate", "apple/copy.png")
def _same_file_twice(root: Path) -> None:
    shutil.copy(root / "apple/0.png", root / "apple/copy.png")


@fault("A34", "near-conflict", "bolt/almost.jpg")
def _almost_the_same_in_two_classes(root: Path) -> None:
    Image.open(root / "apple/0.png").convert("RGB").save(root / "bolt/almost.jpg", quality=80)


@fault("A34", "near-duplicate")
def _almost_the_same_in_a_class(root: Path) -> None:
    Image.open(root / "apple/0.png").convert("RGB").save(root / "apple/almost.jpg", quality=80)


def no_faults(root: Path) -> None:
    """What the catalogue says is no fault: A16 to A20, A23, A24, A30, and files that are none of our business."""
    colour = drawing(50)
    grey16 = Image.fromarray((np.asarray(drawing(51).convert("L")).astype(np.uint16)) * 257)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "\x1b[31m control")
    files: dict[str, bytes] = {
        "large.png": encoded(drawing(52).convert("1").resize((3000, 2000)), "PNG"),
        "cmyk.jpg": encoded(drawing(53).convert("CMYK"), "JPEG"),
        "grey16.png": encoded(grey16, "PNG"),
        "bits.png": encoded(drawing(54).convert("1"), "PNG"),
        "palette.gif": encoded(drawing(55).convert("P"), "GIF"),
        "alpha.png": encoded(drawing(56).convert("RGBA"), "PNG"),
        "turned.jpg": encoded(drawing(57), "JPEG", exif=exif_block(6)),
        "unknown-orientation.jpg": encoded(drawing(58), "JPEG", exif=exif_block(0)),
        "profile.jpg": encoded(drawing(59), "JPEG", icc_profile=b"no profile"),
        "text.png": encoded(drawing(60), "PNG", pnginfo=text),
        "colour.WEBP": encoded(colour, "WEBP", lossless=True),
        "\N{GRINNING FACE} \u05d0.png": encoded(drawing(61), "PNG"),
        "n" * 251 + ".png": encoded(drawing(62), "PNG"),
        "notes.txt": b"BM is no picture here",
    }
    for name, data in files.items():
        (root / "apple" / name).write_bytes(data)
    os.mkfifo(root / "apple/pipe")
    for k in range(6):  # or the classes would be unequal
        for name in ("bolt", "cog", "door"):
            (root / name / f"more{k}.png").write_bytes(encoded(drawing(70 + 6 * len(name) + k, ord(name[0])), "PNG"))
