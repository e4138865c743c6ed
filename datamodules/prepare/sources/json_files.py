"""Lines of a text file, and elements of one JSON list in a large file, without holding the file in memory."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeGuard

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.text_files import HEAD_BYTES, parse_json, read_head, require_line_feeds, require_utf8

from ...shards.sample import SampleError
from .source import or_error

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
        text = _Window(stream, path, begin=_text_begin(stream, path))
        text.begin_list()
        mark = text.peek()
        if mark == "]":
            text.expect("]", "")
        number = 0
        while mark != "]":
            text.peek()
            yield number, text.read_element()
            number += 1
            mark = text.expect(",]", "expected a comma or the end of the list")
        text.end()


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank, or raise DataError where one is not UTF-8."""
    for number, line in raw_lines(path):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error})") from error
        if text.strip():
            yield number, text.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    """Yield (position for errors, object) for each line that is not blank; a SampleError if it is not a JSON object."""
    require_lines(path)
    for number, line in raw_lines(path):
        where = f"{path}, line {number}"
        yield where, or_error(parse_object, line, where=where)


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
_BLOCK_BYTES = 4 << 20
_LARGEST_ELEMENT = 64 << 20
_CLOSING = '}]"'
_AFTER = (",", "]", " ", "\t", "\r", "\n")
_SPACE = re.compile(r"[ \t\r\n]+")


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


class _Window:
    """Window over a file, decoded as one character per byte: JSON's syntax is ASCII, so offsets are bytes."""

    def __init__(self, stream: Any, path: Path, *, begin: int) -> None:
        self._stream = stream
        self._path = path
        self._held = ""
        self._begin = begin  # byte of the file that `_held` begins at
        self._at = 0  # next position in `_held`
        self._decode = json.JSONDecoder().raw_decode

    @property
    def offset(self) -> int:
        """Byte of the file that comes next."""
        return self._begin + self._at

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._held, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def begin_list(self) -> None:
        """Consume the bracket that begins the list, or raise DataError."""
        if self.peek() == "{":
            name = self._path.name
            raise DataError(
                f"{self._path} begins with an object, expected one JSON list of records: of an object on each line "
                f"make one with jq -s . {name}, of an object that holds the list with jq .KEY {name}"
            )
        self.expect("[", "it holds no JSON list")

    def end(self) -> None:
        """Raise DataError where something follows the list."""
        if self.peek():
            rest = self._held[self._at : self._at + 20]
            raise DataError(
                f"{self._path}, byte {self.offset}: the list ends before this byte, but the file continues with "
                f"{rest!r}; join several lists with jq -s add {self._path.name}, or cut the file there"
            )

    def expect(self, marks: str, problem: str) -> str:
        """Consume one of the characters `marks` and return it, or raise DataError."""
        mark = self.peek()
        if not mark or mark not in marks:
            found = repr(mark) if mark else "the end of the file"
            raise DataError(f"{self._path}, byte {self.offset}: {problem}, found {found}; fetch the file again")
        self._at += 1
        return mark

    def read_element(self) -> bytes:
        """Return the text of the element that begins here, or raise DataError where it is not JSON or not UTF-8."""
        while True:
            try:
                _, end = self._decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                # The element extends beyond the window, or is invalid.
                if len(self._held) - self._at > _LARGEST_ELEMENT or not self._more():
                    raise DataError(
                        f"{self._path}: the element at byte {self.offset} is not JSON ({error}); fetch the file again"
                    ) from error
                continue
            text = self._held[self._at : end].encode("latin-1")
            # A number may continue beyond the window: `-1`, then `.5`.
            if self._held[end - 1] in _CLOSING or self._held[end : end + 1] in _AFTER or not self._more():
                break
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: the record at byte {self.offset} is not JSON ({error})") from error
        self._at += len(text)
        return text

    def _more(self) -> bool:
        """Read the next block and drop consumed text; False at the end of the file."""
        block = self._stream.read(_BLOCK_BYTES)
        self._held = self._held[self._at :] + block.decode("latin-1")
        self._begin += self._at
        self._at = 0
        return bool(block)
