"""What a file is by its first bytes, whatever it is called."""

from __future__ import annotations

import re

HEAD_BYTES = 512
"""How much of a file `content_format` wants to see."""

EXTENSION_FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
    ".gif": "GIF",
}  # fmt: skip
"""The format that an extension promises."""

_SUPPORTED = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("TIFF", re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+")),
    # "BM" alone begins many a text; the size of the header that follows is one of a few.
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
)
_OTHER_PICTURES = (
    ("a HEIC or AVIF picture", re.compile(rb".{4}ftyp(?:hei|hev|mif1|msf1|avi[fs])", re.DOTALL)),
    ("a JPEG 2000 picture", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("a JPEG XL picture", re.compile(rb"\0\0\0\x0cJXL |\xff\x0a")),
    ("a Photoshop file", re.compile(rb"8BPS")),
    ("a PostScript file", re.compile(rb"%!PS|\xc5\xd0\xd3\xc6")),
    ("a PDF file", re.compile(rb"%PDF-")),
    ("an SVG drawing", re.compile(rb"\s*(?:<\?xml.*?|<!--.*?|<!DOCTYPE svg.*?)*<svg", re.DOTALL)),
    ("a FITS file", re.compile(rb"SIMPLE  =")),
    ("a DDS texture", re.compile(rb"DDS \x7c")),
    ("an icon", re.compile(rb"\0\0[\x01\x02]\0[\x01-\xff]\0")),
    ("a Netpbm picture", re.compile(rb"P[1-6]\s+(?:#.*\n)*\d+\s+\d+\s")),
)
_NO_PICTURES = (
    ("an HTML page", re.compile(rb"\s*(?:<!doctype html|<html)", re.IGNORECASE)),
    ("a ZIP archive or Office document", re.compile(rb"PK\x03\x04|PK\x05\x06")),
    ("a compressed archive", re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!")),
    ("a video", re.compile(rb".{4}ftyp|RIFF.{4}AVI |\x1a\x45\xdf\xa3", re.DOTALL)),
    ("a program", re.compile(rb"\x7fELF|MZ.{62}", re.DOTALL)),
)


def content_format(head: bytes) -> str | None:
    """The format, of those that `preprocess` reads, that a file beginning with `head` has; None: none of them."""
    return next((name for name, pattern in _SUPPORTED if pattern.match(head)), None)


def unsupported_picture(head: bytes) -> str | None:
    """What kind of picture this is ("a HEIC or AVIF picture"), of kinds that are not read; None: none known."""
    return next((name for name, pattern in _OTHER_PICTURES if pattern.match(head)), None)


def looks_like(head: bytes) -> str | None:
    """What a file that is no readable picture seems to be, with its article; None: not known."""
    known = unsupported_picture(head) or next((name for name, pattern in _NO_PICTURES if pattern.match(head)), None)
    if known is None and head and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "text"
    return known
