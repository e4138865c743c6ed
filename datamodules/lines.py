"""Lines of a text file."""

from collections.abc import Iterator
from pathlib import Path

from alignvlm_pl.errors import DataError


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
