"""Files from elsewhere: what they are by their first bytes, byte order marks, UTF-16, names that are given twice."""

import codecs
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DataError

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Without a mark: which of the first four bytes are zero where a text begins with two ASCII characters.
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress (.Z)",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}
_LINE_BYTES = 1 << 16
# After "BZh" and a digit, which a text may begin with: those of a first block, and of the end of an empty file.
_BZIP2 = (b"1AY&", b"\x17rE8")
_CONTENT = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"8BPS": "a Photoshop image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"PAR1": "a parquet file",
    b"\x1aE\xdf\xa3": "a video",
    b"version https://git-lfs": "a pointer of Git LFS, which git lfs pull replaces by the file",
    b"iVBORw0KGgo": "an image in base64, to be decoded first",
    b"/9j/": "an image in base64, to be decoded first",
    b"R0lGOD": "an image in base64, to be decoded first",
    b"UklGR": "an image in base64, to be decoded first",
    b"data:": "a data: URL, to be decoded first",
}
# Of ISO media files, by the brand in bytes 8 to 11.
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC image"
)
_MARKUP = ((b"<svg", "an SVG drawing"), (b"<html", "an HTML page"), (b"<!doctype html", "an HTML page"))
HEAD_BYTES = 512
"""First bytes of a file that `wide_encoding`, `compression` and `content_kind` look at."""


def read_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` of a file."""
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def compression(head: bytes) -> str:
    """Return the compression of a file by its first `HEAD_BYTES`; empty where none is known."""
    if head.startswith(b"BZh") and head[4:8] in _BZIP2:
        return "bzip2"
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def content_kind(head: bytes) -> str:
    """Return what a file is by its first `HEAD_BYTES`, for example ``a PDF document``; empty where it is not known.

    Formats that are read under their own name are known, too: one that is called otherwise is not a damaged file.
    """
    if kind := compression(head):
        return f"{kind}, to be unpacked first"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[257:262] == b"ustar":
        return "a tar"
    text = head[:HEAD_BYTES].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith(b"<"):
        return next((kind for mark, kind in _MARKUP if mark in text), "XML" if text.startswith(b"<?xml") else "")
    return next((kind for magic, kind in _CONTENT.items() if head.startswith(magic)), "")


def wide_encoding(head: bytes) -> str:
    """Return the encoding of a text where its first bytes are those of UTF-16 or UTF-32; else an empty text."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), "")
    return marked or _ZEROS.get(tuple(byte == 0 for byte in head[:4]), "")


def decode_text(data: bytes) -> str:
    """Decode a whole text: UTF-8 with or without a byte order mark, UTF-16 or UTF-32; else a UnicodeDecodeError."""
    if kind := compression(data[:HEAD_BYTES]):
        raise UnicodeDecodeError("text", data[:HEAD_BYTES], 0, len(data[:HEAD_BYTES]), f"it is {kind}; unpack it first")
    return data.decode(wide_encoding(data[:HEAD_BYTES]) or "utf-8-sig")


def require_utf8(head: bytes, *, where: str) -> None:
    """Raise DataError where the first bytes of a file that is read in pieces are of a compressed one or UTF-16, -32."""
    require_unpacked(head, where=where)
    if wide := wide_encoding(head):
        name = wide.upper()[:6]
        raise DataError(f"{where} is {name}, expected UTF-8; write it again: iconv -f {name} -t UTF-8")


def require_unpacked(head: bytes, *, where: str) -> None:
    """Raise DataError where the first bytes of a file are those of a compressed one, an image, an HTML page."""
    if kind := compression(head):
        raise DataError(f"{where} is {kind}, expected text; unpack it first")
    if kind := content_kind(head):
        raise DataError(f"{where} is {kind}; expected text")


def require_line_feeds(path: Path) -> None:
    """Raise DataError where the lines of a file end with carriage returns alone: it would be read as one line."""
    with path.open("rb") as stream:
        head = stream.read(_LINE_BYTES)
    if b"\r" in head.strip() and b"\n" not in head:
        raise DataError(
            f"{path}: its lines end with CR alone, expected LF; write it again: tr '\\r' '\\n' < {path.name}"
        )


class RepeatedKeyError(ValueError):
    """An object of a JSON text has a key twice."""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads`, but raise RepeatedKeyError where a key is given twice, of which it keeps the last."""
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKeyError(f"the key {repeated_name(key for key, _ in pairs)!r:.80} is given twice")
    return found


def require_unique_columns(names: Iterable[object], *, where: str) -> None:
    """Raise DataError where a table has two columns of one name; columns without a name are read by nobody."""
    if (name := repeated_name(name for name in names if name not in (None, ""))) is not None:
        raise DataError(f"{where} has the column {name!r:.80} twice: rename or remove one")


def repeated_name(names: Iterable[Any]) -> Any:
    """Return the first name that is there more than once; None where there is none."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
