"""Tab-separated tables, a row at a time: a row that does not read is named, and takes no other with it."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

_MAX_FIELD = 2**31 - 1  # pictures in base64 are longer than csv's own limit


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        number: Its number as a spreadsheet shows it; the header is row 1.
        offset: Byte where it begins.
        cells: Column -> text; empty where there is a problem.
        problem: Why it cannot be used; empty where it can.
    """

    number: int
    offset: int
    cells: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class TabTable:
    """A tab-separated file in UTF-8 with a header; one row is in memory at a time.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(_MAX_FIELD)
        self.path = path
        with path.open("rb") as stream:
            self.header = next(csv.reader(_Lines(stream), delimiter="\t"), [])

    def rows(self, start: int = 0) -> Iterator[TableRow]:
        """Yield the rows after the header; empty lines are passed over.

        Args:
            start: Byte where a row begins, to begin there; its number is then unknown, 0.
        """
        with self.path.open("rb") as stream:
            stream.seek(start)
            lines = _Lines(stream)
            reader, number = csv.reader(lines, delimiter="\t"), -1 if start else 0
            while True:
                number, offset, lines.first_end = number + 1, lines.offset, -1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield TableRow(number=number, offset=offset, problem=str(error))
                    continue
                if not cells or not offset:
                    continue
                row = self._row(number, offset, cells)
                if row.problem and lines.first_end < lines.offset:
                    # A quote that nothing closes takes the lines after it into its cell: they are read again.
                    lines.go_to(lines.first_end)
                    reader = csv.reader(lines, delimiter="\t")
                yield row

    def _row(self, number: int, offset: int, cells: list[str]) -> TableRow:
        width = len(self.header)
        if any(line.count("\t") >= width - 1 for cell in cells for line in cell.split("\n")[1:]):
            problem = "a quotation mark that is not closed runs into the next rows"
        elif len(cells) != width:
            problem = f"expected {width} columns, found {len(cells)}"
        elif any("\udc80" <= mark <= "\udcff" for cell in cells if not cell.isascii() for mark in cell):
            problem = "not UTF-8"
        else:
            return TableRow(number=number, offset=offset, cells=dict(zip(self.header, cells, strict=True)))
        return TableRow(number=number, offset=offset, problem=problem)


class _Lines:
    """Lines of a file as text; knows the byte after the last one taken, which csv's own reading does not tell.

    Attributes:
        offset: The byte after the last line.
        first_end: The byte after the first line of the row that is being read; -1 where it has not begun.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.offset = stream.tell()
        self.first_end = -1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        begin, self.offset = self.offset, self.offset + len(line)
        if self.first_end < 0:
            self.first_end = self.offset
        # Bytes that are no UTF-8 spoil their own row alone.
        return line.decode("utf-8", "surrogateescape").removeprefix("" if begin else "\ufeff")

    def go_to(self, offset: int) -> None:
        """Take the line that begins at a byte next."""
        self._stream.seek(offset)
        self.offset = offset
