"""Lines of a text file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from alignvlm_pl.errors import DataError

from ...shards.sample import SampleError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are not blank, the first being line 1.

    A line ends with a line feed alone: texts of data sets hold the other marks that `str.splitlines` takes for ends.

    Raises:
        DataError: A line is not UTF-8.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error})") from error
            if text.strip():
                yield number, text.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    """Yield place and object of the lines that are not blank; where a line is no object, the error that says so."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield where, SampleError(f"{where}: not JSON ({error})", "bad_json")
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                yield where, SampleError(f"{where}: expected an object, found {record!r:.60}", "bad_json")


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that has an encoding and is not blank."""
    return isinstance(value, str) and bool(value.strip()) and _has_encoding(value)


def _has_encoding(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
