"""Pictures: files of every format and mode, whole and damaged, through the one decoder of the project."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.features
from fuzz.driver import Target
from fuzz.mutations import NUMBERS, mutated
from PIL import Image, ImageFilter

import siamese_deploy.preprocess as preprocess
from siamese_deploy.errors import ImageError
from siamese_deploy.preprocess import MIN_SIDE_PIXELS, Preprocess, decode_image, load_image, resize_image

SIZE_HW = (24, 32)
# Just inside the limits, and beyond them.
_SIZES = (
    (7071, 7071), (50_000, 1000), (8, 65_535), (16_383, 3051), (65_500, 763), (7072, 7071), (13_000, 13_000),
    (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (2**32 - 1, 9), (0, 9), (1, 9000), (65_535, 65_535),
)  # fmt: skip
_STRANGERS = (
    b"", b"\0" * 100, b"<!DOCTYPE html><html><body>404</body></html>", b"PK\x03\x04" + b"\0" * 60, b"%PDF-1.7\n%",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + b"\0" * 40, b"<svg xmlns='x'/>", b"GIF89a",
    b"SIMPLE  =                    T", b"P6\n9 9\n255\n" + b"x" * 243, b"\0\0\1\0\1\0\x10\x10" + b"\0" * 60,
    b"\x7fELF\2\1\1", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"\xff\xd8\xff", b"BM", b"II*\0\x08\0\0\0", b"MM\0+\0\x08\0\0",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x20ftypheic", b"\x1f\x8b\x08", b"SQLite format 3\0",
)  # fmt: skip


def _pattern(random: np.random.RandomState, mode: str) -> Image.Image:
    height, width = random.randint(MIN_SIDE_PIXELS, 40, 2)
    if mode == "F":
        return Image.fromarray(random.normal(0, 99, (height, width)).astype(np.float32))
    if mode.startswith("I"):
        values = random.randint(0, 2**16, (height, width))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else ">u2" if mode == "I;16B" else np.uint16))
    image = Image.fromarray(random.randint(0, 256, (height, width, 4)).astype(np.uint8), "RGBA")
    if random.randint(2):
        image = image.filter(ImageFilter.BLUR)
    return (
        image.convert("RGB").convert(mode) if mode in ("P", "1", "L", "CMYK", "YCbCr", "LAB") else image.convert(mode)
    )


def exif(random: np.random.RandomState) -> bytes:
    """A block with an orientation, mostly one of the eight, sometimes damaged."""
    order = "<>"[random.randint(2)]
    orientation = int((*range(1, 9), 0, 9, 65535)[random.randint(11)])
    entries = struct.pack(order + "HHLHH", 0x0112, (3, 3, 3, 4, 2, 0, 99)[random.randint(7)], 1, orientation, 0)
    count = (1, 1, 1, 0, 2, 65535)[random.randint(6)]
    block = (b"II" if order == "<" else b"MM") + struct.pack(order + "HLH", 42, 8, count) + entries + b"\0" * 4
    return b"Exif\0\0" + (mutated(random, block) if random.randint(3) == 0 else block)


def _jpeg(random: np.random.RandomState) -> bytes:
    image = _pattern(random, ("RGB", "L", "CMYK")[random.randint(3)])
    options = {"quality": int(random.randint(1, 100)), "progressive": bool(random.randint(2))}
    if image.mode == "RGB":
        options["subsampling"] = int(random.randint(3))
    if random.randint(2):
        options["exif"] = exif(random)
    if random.randint(4) == 0:
        options["restart_marker_blocks"] = 1
    if random.randint(8) == 0:
        options["icc_profile"] = random.bytes(300)
    data = _saved(image, "JPEG", **options)
    if image.mode == "CMYK" and random.randint(2):  # the same numbers called YCCK
        at = data.find(b"Adobe") + 11
        data = data[:at] + b"\2" + data[at + 1 :]
    return data


def _png(random: np.random.RandomState) -> bytes:
    kind = random.randint(4)
    if kind == 0:
        return _handmade_png(random)
    image = _pattern(random, ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")[random.randint(7)])
    options: dict[str, object] = {}
    if image.mode == "P":
        options["bits"] = (1, 2, 4, 8)[random.randint(4)]
        if random.randint(2):
            options["transparency"] = random.bytes(4)
    elif image.mode in ("L", "RGB") and random.randint(3) == 0:
        options["transparency"] = 7 if image.mode == "L" else (1, 2, 3)
    if random.randint(3) == 0:
        options["exif"] = exif(random)[6:]
    if kind == 1 and image.mode != "I;16":
        options |= {"save_all": True, "append_images": [image.rotate(90), image], "duration": 10}
    return _saved(image, "PNG", **options)


def _handmade_png(random: np.random.RandomState) -> bytes:
    """Any depth and colour type, interlaced or not, with random pixels; Pillow writes no such files."""
    colour, depth = ((0, 1), (0, 2), (0, 4), (0, 16), (2, 16), (3, 2), (4, 16), (6, 16), (2, 8), (6, 8))[
        random.randint(10)
    ]
    height, width = (int(side) for side in random.randint(MIN_SIDE_PIXELS, 30, 2))
    interlaced = random.randint(2)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = (
        ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        if interlaced
        else ((0, 0, 1, 1),)
    )
    rows = b""
    for x, y, step_x, step_y in passes:
        pass_width, pass_height = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if pass_width > 0:
            row_bytes = (pass_width * channels * depth + 7) // 8
            rows += b"".join(bytes([random.randint(5)]) + random.bytes(row_bytes) for _ in range(pass_height))
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header)]
    if colour == 3:
        chunks.append((b"PLTE", random.bytes(12)))
    if random.randint(3) == 0:
        chunks.append((b"tRNS", random.bytes((0, 2, 3, 6)[random.randint(4)])))
    chunks += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _webp(random: np.random.RandomState) -> bytes:
    image = _pattern(random, ("RGB", "RGBA", "L")[random.randint(3)])
    options: dict[str, object] = {"lossless": bool(random.randint(2)), "method": 0}
    if random.randint(3) == 0:
        options["exif"] = exif(random)
    if random.randint(4) == 0:
        options |= {"save_all": True, "append_images": [image.rotate(90)]}
    return _saved(image, "WEBP", **options)


def _bmp(random: np.random.RandomState) -> bytes:
    if random.randint(4):
        return _saved(_pattern(random, ("1", "L", "P", "RGB", "RGBA")[random.randint(5)]), "BMP")
    # Run-length encoded, which Pillow reads and does not write.
    depth = (8, 4)[random.randint(2)]
    runs = b"".join(bytes([random.randint(0, 9), random.randint(256)]) for _ in range(random.randint(80))) + b"\0\1"
    size, start = 14 + 40 + 1024 + len(runs), 14 + 40 + 1024
    head = struct.pack("<2sLLL", b"BM", size, 0, start)
    return (
        head
        + struct.pack("<LllHHLLllLL", 40, 12, 12, 1, depth, 3 - depth // 4, len(runs), 0, 0, 256, 0)
        + (random.bytes(1024) + runs)
    )


def _tiff(random: np.random.RandomState) -> bytes:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F")
    image = _pattern(random, modes[random.randint(len(modes))])
    names = ["raw", "tiff_lzw", "packbits", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "lzma", "zstd", "webp"]
    if image.mode == "1":
        names += ["group3", "group4", "tiff_ccitt"]
    options: dict[str, object] = {"compression": names[random.randint(len(names))]}
    if random.randint(4) == 0:
        options |= {"save_all": True, "append_images": [image.copy(), image.copy()]}
    if random.randint(4) == 0:
        options["tiffinfo"] = {274: int(random.randint(0, 10))}
    if random.randint(6) == 0:
        options["big_tiff"] = True
    try:
        return _saved(image, "TIFF", **options)
    except (OSError, KeyError, ValueError, RuntimeError):  # a compression that this libtiff, or this mode, has not
        return _saved(image, "TIFF")


def _gif(random: np.random.RandomState) -> bytes:
    image = _pattern(random, ("L", "P", "RGB", "RGBA", "1")[random.randint(5)])
    options: dict[str, object] = {"interlace": random.randint(2)}
    if random.randint(2):
        options |= {"save_all": True, "append_images": [image.rotate(90), image], "disposal": int(random.randint(4))}
    return _saved(image, "GIF", **options)


def _saved(image: Image.Image, format_name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


MAKERS: dict[str, Callable[[np.random.RandomState], bytes]] = {
    "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "BMP": _bmp, "TIFF": _tiff, "GIF": _gif,
}  # fmt: skip


def _with_other_png_chunk(random: np.random.RandomState, data: bytes) -> bytes:
    """One chunk changed, doubled, moved or left out, with its checksum made right again."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (size,) = struct.unpack_from(">L", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    k = random.randint(len(chunks))
    kind, content = chunks[k]
    action = random.randint(6)
    if action <= 2:
        if kind == b"IDAT" and random.randint(2):  # also behind the compression
            content = zlib.compress(mutated(random, zlib.decompressobj().decompress(content, 10**6)), 1)
        else:
            content = mutated(random, content, most=2)
        chunks[k] = (kind, content)
    elif action == 3:
        chunks.insert(random.randint(len(chunks)), chunks[k])
    elif action == 4:
        del chunks[k]
    else:
        kinds = (b"tRNS", b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"pHYs")
        content = random.bytes(random.randint(40))
        if random.randint(2):  # much text in few bytes
            content = b"a\0\0" + zlib.compress(b"x" * (1 << int(random.randint(24))), 9)
        chunks.insert(1, (kinds[random.randint(len(kinds))], content))
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _with_other_size(random: np.random.RandomState, data: bytes) -> bytes:
    """Another width or height in the header; rarely both, and so large that the decoder has to work for it."""
    if random.randint(20) == 0:
        for second, side in enumerate(_SIZES[random.randint(len(_SIZES))]):
            data = _with_side(random, data, second, side)
        return data
    return _with_side(random, data, random.randint(2), int(random.randint(1, 300)))


def _with_side(random: np.random.RandomState, data: bytes, second: int, side: int) -> bytes:
    changed = bytearray(data)
    if data.startswith(b"\x89PNG"):
        struct.pack_into(">L", changed, 16 + 4 * second, side)
        struct.pack_into(">L", changed, 29, zlib.crc32(changed[12:29]))
    elif data.startswith(b"\xff\xd8"):
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        if 0 <= at < len(data) - 9:
            struct.pack_into(">H", changed, at + 5 + 2 * second, side % 2**16)
    elif data.startswith(b"GIF"):
        at = 6 if random.randint(2) else data.find(b",") + 5
        if at + 4 <= len(data):
            struct.pack_into("<H", changed, at + 2 * second, side % 2**16)
    elif data.startswith(b"BM"):
        struct.pack_into("<L", changed, 18 + 4 * second, side if random.randint(4) else 2**32 - max(side, 1))
    elif data.startswith(b"RIFF"):
        at = {b"VP8 ": 26, b"VP8L": 21, b"VP8X": 24}.get(data[12:16], 24)
        struct.pack_into("<H", changed, at + 2 * second, side % 2**16)
    else:
        return _with_other_tiff_tag(random, data)
    return bytes(changed)


def _with_other_tiff_tag(random: np.random.RandomState, data: bytes) -> bytes:
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "L", data, 4)
    if start + 2 > len(data):
        return mutated(random, data)
    (count,) = struct.unpack_from(order + "H", data, start)
    at = start + 2 + 12 * random.randint(max(1, min(count, 40)))
    if at + 12 > len(data):
        return mutated(random, data)
    changed = bytearray(data)
    number = NUMBERS[random.randint(len(NUMBERS))]
    where, code = ((0, "H"), (2, "H"), (4, "L"), (8, "L"), (8, "H"))[random.randint(5)]
    struct.pack_into(order + code, changed, at + where, number % (1 << 8 * struct.calcsize(code)))
    return bytes(changed)


def _with_other_jpeg_length(random: np.random.RandomState, data: bytes) -> bytes:
    places = [k for k in range(len(data) - 3) if data[k] == 255 and 0xC0 <= data[k + 1] <= 0xFE]
    at = places[random.randint(len(places))]
    changed = bytearray(data)
    if random.randint(2):
        struct.pack_into(">H", changed, at + 2, int(random.randint(2**16)))
    else:
        changed[at + 1] = random.randint(0xC0, 0xFF)
    return bytes(changed)


class Pictures(Target):
    """A file is an RGB picture in uint8 or an ImageError with a reason: from bytes, and the same from its path."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in ("jpg", "zlib", "libtiff", "webp") if not PIL.features.check(name)]
        assert not missing, f"this Pillow has no {missing}"
        warnings.simplefilter("ignore")  # as the commands do
        self.file = folder / "picture"
        random = np.random.RandomState(0)
        self.pool = {name: [make(random) for _ in range(60)] for name, make in MAKERS.items()}
        self.others = [data for pool in self.pool.values() for data in pool[:10]]

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        name = list(MAKERS)[number % len(MAKERS)]
        if random.randint(10) == 0:
            return MAKERS[name](random)
        data = self.pool[name][random.randint(60)]
        kind = random.randint(10)
        if kind == 0:
            stranger = _STRANGERS[random.randint(len(_STRANGERS))]
            return stranger + data[random.randint(2) * len(stranger) :]
        if kind <= 2:
            return _with_other_size(random, data)
        if kind <= 4:
            special = {"PNG": _with_other_png_chunk, "TIFF": _with_other_tiff_tag, "JPEG": _with_other_jpeg_length}
            data = special.get(name, _with_other_size)(random, data)
            return data if random.randint(2) else mutated(random, data, self.others)
        return mutated(random, data, self.others)

    def check(self, data: bytes) -> str:
        started = time.process_time()
        outcome, pixels = self._decoded(lambda: resize_image(_checked(decode_image(data)), SIZE_HW))
        # Large ones not twice: what is limited is the time of one.
        if zlib.crc32(data) % 16 == 0 and time.process_time() - started < self.seconds / 10:
            self.file.write_bytes(data)
            again, from_path = self._decoded(lambda: load_image(self.file, Preprocess(SIZE_HW)))
            same = np.array_equal(pixels, from_path) if pixels is not None else from_path is None
            assert same, f"{outcome} from bytes, {again} from the path"
        return outcome

    def _decoded(self, decode: Callable[[], np.ndarray]) -> tuple[str, np.ndarray | None]:
        try:
            pixels = decode()
        except ImageError as error:
            reason = error.reason
        else:
            assert (pixels.dtype, pixels.shape) == (np.uint8, (*SIZE_HW, 3)), (pixels.dtype, pixels.shape)
            return "decoded", pixels
        assert reason.strip()
        assert "\n" not in reason
        return f"refused, {reason.partition(':')[0].removeprefix('damaged or truncated ')}", None

    def sabotage(self) -> None:
        """The decoder's net catches OSError only."""

        def narrow(name: str, data: bytes, decode: Callable[[], Image.Image]) -> Image.Image:
            try:
                return decode()
            except ImageError:
                raise
            except OSError as error:
                raise ImageError(name, f"damaged ({error})") from error

        preprocess._guarded = narrow


def _checked(image: Image.Image) -> Image.Image:
    assert image.mode == "RGB"
    assert min(image.size) >= MIN_SIDE_PIXELS
    return image


def _large(mode: str, format_name: str, side: int = 7071, **options: object) -> Callable[[], bytes]:
    return lambda: _saved(Image.new(mode, (side, side)), format_name, **options)


def _jpeg_in_scans(side: int, components: int) -> bytes:
    """Sequential, but with a scan for each component; all of one colour. Pillow writes no such files."""
    plain = _saved(Image.new("L", (8, 8)), "JPEG")
    tables, at = b"", 2
    while plain[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", plain, at + 2)[0]
        tables += plain[at:end] if plain[at + 1] in (0xDB, 0xC4) else b""
        at = end
    sizes = b"".join(bytes([k, 0x11, 0]) for k in range(components))
    frame = struct.pack(">HHBHHB", 0xFFC0, 8 + 3 * components, 8, side, side, components) + sizes
    blocks = b"\x28\xa2\x8a" * (((side + 7) // 8) ** 2 // 4 + 1)  # four blocks of "no change, end of block"
    scans = (struct.pack(">HHBBBBBB", 0xFFDA, 8, 1, k, 0, 0, 63, 0) + blocks for k in range(components))
    return b"\xff\xd8" + tables + frame + b"".join(scans) + b"\xff\xd9"


def _run_length_bmp(depth: int, side: int, pixels: bytes) -> bytes:
    head = struct.pack("<2sLLL", b"BM", 1078 + len(pixels), 0, 1078)
    return (
        head
        + struct.pack("<LllHHLLllLL", 40, side, side, 1, depth, 3 - depth // 4, 0, 0, 0, 256, 0)
        + (bytes(1024) + pixels)
    )


_SIDEWAYS = b"Exif\0\0II*\0" + struct.pack("<LHHHLHHL", 8, 1, 0x0112, 3, 1, 6, 0, 0)
LARGE: dict[str, Callable[[], bytes]] = {
    "PNG I;16": _large("I;16", "PNG", compress_level=1),
    "PNG LA": _large("LA", "PNG", compress_level=1),
    "PNG P transparent": _large("P", "PNG", compress_level=1, transparency=0),
    "PNG RGB": _large("RGB", "PNG", compress_level=1),
    "PNG RGBA": _large("RGBA", "PNG", compress_level=1),
    "PNG RGB sideways": _large("RGB", "PNG", compress_level=1, exif=_SIDEWAYS[6:]),
    "JPEG RGB": _large("RGB", "JPEG"),
    "JPEG RGB progressive sideways": _large("RGB", "JPEG", 5000, progressive=True, subsampling=0, exif=_SIDEWAYS),
    "JPEG CMYK": _large("CMYK", "JPEG"),
    "JPEG CMYK in scans": lambda: _jpeg_in_scans(5000, 4),
    "WEBP RGB lossy": _large("RGB", "WEBP", 5000, method=0),
    "WEBP RGB": _large("RGB", "WEBP", 5000, lossless=True, method=0, quality=0),
    "WEBP RGBA": _large("RGBA", "WEBP", 5000, lossless=True, method=0, quality=0),
    "GIF transparent": _large("P", "GIF", transparency=0),
    "TIFF RGBA deflate": _large("RGBA", "TIFF", compression="tiff_adobe_deflate"),
    "TIFF CMYK jpeg": _large("CMYK", "TIFF", compression="jpeg"),
    "TIFF LAB deflate": _large("LAB", "TIFF", 5000, compression="tiff_adobe_deflate"),
    "TIFF RGBA one strip": _large("RGBA", "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 7071}),
    "BMP run-length 8": lambda: _run_length_bmp(8, 1000, b"\0\2\1\0\0\0" * 1000),
    "BMP run-length 4": lambda: _run_length_bmp(4, 1000, (b"\xff\x12" * 4 + b"\0\0") * 1000),
}
"""Small files of as many pixels as are accepted."""


class LargePictures(Pictures):
    """The most pixels that are accepted, in each kind of file."""

    def make(self, random: np.random.RandomState, number: int) -> bytes:
        return list(LARGE.values())[number]()
