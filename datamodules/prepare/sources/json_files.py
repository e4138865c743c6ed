"""Lines of a text file, and elements of one JSON list in a large file, without holding the file in memory."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, TypeGuard

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.text_files import HEAD_BYTES, parse_json, read_head, require_line_feeds, require_utf8

from ...shards.sample import SampleError

RawRecord = tuple[int, bytes]
"""Number, and text of a line or of an element of a list."""


def raw_lines(path: Path) -> Iterator[RawRecord]:
    """Yield the lines that are not blank, numbered from 1.

    Only a line feed ends a line: texts of datasets contain the other line breaks of `str.splitlines`. DataError is
    raised for UTF-16, UTF-32, what is no text, and lines that end with CR alone.
    """
    require_utf8(read_head(path), where=str(path))
    require_line_feeds(path)
    with path.open("rb") as stream:
        for number, text in enumerate(stream, start=1):
            if text.strip():
                yield number, text.removeprefix(BOM_UTF8)


def raw_elements(path: Path) -> Iterator[RawRecord]:
    """Yield the elements of a JSON list, numbered from 0; DataError names the byte of damage."""
    with path.open("rb") as stream:
        begin = _list_begin(stream, path)
        text = mmap(stream.fileno(), 0, access=ACCESS_READ)  # closed with its last match: one that is left forbids it
    depth = number = 0
    for match in _SYNTAX.finditer(text, begin):
        mark = match[0]
        if depth == 1 and mark == b"}":
            raise DataError(
                f"{path}, byte {match.start()}: expected a comma or the end of the list, found '}}'; fetch it again"
            )
        if depth == 1 and mark in (b",", b"]"):
            element = text[begin : match.start()]
            if element.strip() or number or mark == b",":  # `[]` has none
                yield number, _checked(element, path, begin)
                number += 1
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth == 0:
            return _check_end(text, match.end(), path)
        if depth == 1 and mark in (b"[", b","):
            begin = match.end()
    raise DataError(f"{path}: the file ends inside the list, in the record at byte {begin}; fetch the file again")


def parse_object(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Parse a JSON object, or raise SampleError (``bad_json``)."""
    try:
        record = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where}: not JSON ({error})", "bad_json") from error
    if not isinstance(record, dict):
        raise SampleError(f"{where}: expected an object, found {record!r:.60}", "bad_json")
    return record


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that has an encoding and is not blank."""
    try:
        return isinstance(value, str) and bool(value.strip().encode("utf-8"))
    except UnicodeEncodeError:
        return False


_HEAD = 4096
_SYNTAX = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', re.DOTALL)
"""Strings, which may hold the other marks, and what begins, parts and ends lists and objects."""


def is_list(path: Path) -> bool:
    """Return whether a file begins as a JSON list; raise DataError where there is none, or it is not UTF-8."""
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    with path.open("rb") as stream:
        _text_begin(stream, path)
        return stream.read(_HEAD).lstrip()[:1] == b"["


def require_lines(path: Path) -> None:
    """Raise DataError where a file of lines of JSON is one list."""
    if is_list(path):
        raise DataError(f"{path} is one JSON list, expected an object on each line: jq -c '.[]' {path.name}")


def _text_begin(stream: IO[bytes], path: Path) -> int:
    """Go to the first byte of a text after its byte order mark, and return it."""
    head = stream.read(HEAD_BYTES)
    require_utf8(head, where=str(path))
    return stream.seek(len(BOM_UTF8) if head.startswith(BOM_UTF8) else 0)


def _list_begin(stream: IO[bytes], path: Path) -> int:
    """Return the byte that a list begins at; raise DataError where there is none."""
    begin = _text_begin(stream, path)
    head = stream.read(_HEAD)
    begin += len(head) - len(head.lstrip())
    first = head.lstrip()[:1]
    if first == b"{":
        raise DataError(
            f"{path} begins with an object, expected one JSON list of records: of an object on each line "
            f"make one with jq -s . {path.name}, of an object that holds the list with jq .KEY {path.name}"
        )
    if first != b"[":
        found = repr(first.decode("latin-1")) if first else "the end of the file"
        raise DataError(f"{path}, byte {begin}: it holds no JSON list, found {found}; fetch the file again")
    return begin


def _checked(element: bytes, path: Path, begin: int) -> bytes:
    """Return the text of an element that is JSON in UTF-8, or raise DataError; `begin` is its byte of the file."""
    text = element.strip()
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        byte = begin + len(element) - len(element.lstrip())
        raise DataError(f"{path}: the record at byte {byte} is not JSON ({error}); fetch the file again") from error
    return text


def _check_end(text: mmap, end: int, path: Path) -> None:
    """Raise DataError where something follows the list."""
    if more := re.compile(rb"\S").search(text, end):
        found = text[more.start() : more.start() + 20].decode("latin-1")
        raise DataError(
            f"{path}, byte {more.start()}: the list ends before this byte, but the file continues with {found!r}; join "
            f"several lists with jq -s add {path.name}, or cut the file there"
        )
