"""Text of files from elsewhere: byte order marks, UTF-16."""

import codecs

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
HEAD_BYTES = 4
"""First bytes of a file that `wide_encoding` looks at."""


def wide_encoding(head: bytes) -> str:
    """Return the encoding of a text where its first bytes are those of UTF-16 or UTF-32; else an empty text."""
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), "")
    return marked or _ZEROS.get(tuple(byte == 0 for byte in head[:HEAD_BYTES]), "")


def decode_text(data: bytes) -> str:
    """Decode a whole text: UTF-8 with or without a byte order mark, UTF-16 or UTF-32.

    Raises:
        UnicodeDecodeError: It is none of them.
    """
    return data.decode(wide_encoding(data[:HEAD_BYTES]) or "utf-8-sig")


def require_utf8(head: bytes, *, where: str) -> None:
    """Raise DataError where the first bytes of a file that is read in pieces are those of UTF-16 or UTF-32."""
    if wide := wide_encoding(head):
        name = wide.upper()[:6]
        raise DataError(f"{where} is {name}, expected UTF-8; write it again: iconv -f {name} -t UTF-8")
