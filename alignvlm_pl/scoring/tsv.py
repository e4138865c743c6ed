"""Tab-separated tables, a row at a time: an invalid row is reported, and the next ones are read nevertheless."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from alignvlm_pl.utils.text_files import read_head, require_line_feeds, require_unique_columns, require_utf8

_MAX_FIELD = 2**31 - 1  # images in base64 are longer than csv's own limit
MAX_CONTINUED = 2**26
"""Bytes that a row may have after its first line; a quotation mark that is not closed would read on to the end."""
_OPEN = "a quotation mark that is not closed runs into the next rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """One row of a table: its number as a spreadsheet shows it (the header is row 1), and the byte where it begins.

    `cells` are column -> text; of an invalid row they are empty, and `problem` says why.
    """

    number: int
    offset: int
    cells: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class TabTable:
    """A tab-separated file in UTF-8 with a header; one row is in memory at a time.

    Raises:
        OSError: It cannot be opened.
        DataError: It is no text, UTF-16 or UTF-32, its lines end with CR alone, or it has two columns of one name.
    """

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(_MAX_FIELD)
        self.path = path
        require_utf8(read_head(path), where=str(path))
        require_line_feeds(path)
        with path.open("rb") as stream:
            try:
                self.header = next(csv.reader(_Lines(stream), delimiter="\t"), [])
            except csv.Error:
                self.header = []
        require_unique_columns(self.header, where=str(path))

    def rows(self, start: int = 0) -> Iterator[TableRow]:
        """Yield the rows after the header, or from the byte `start`, without numbers; empty lines are skipped."""
        with self.path.open("rb") as stream:
            stream.seek(start)
            lines = _Lines(stream)
            reader, number = csv.reader(lines, delimiter="\t"), -1 if start else 0
            while True:
                number, offset = number + 1, lines.offset
                lines.taken = []
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    row = TableRow(number=number, offset=offset, problem=str(error))
                else:
                    if not cells or not offset:
                        continue
                    row = self._row(number, offset, cells, lines.taken)
                if row.problem and len(lines.taken) > 1:
                    # A quote that is not closed takes the next lines into its cell: they are read again.
                    lines.offset = stream.seek(lines.first_end)
                    reader = csv.reader(lines, delimiter="\t")
                yield row

    def _row(self, number: int, offset: int, cells: list[str], lines: list[str]) -> TableRow:
        width = len(self.header)
        if not _is_closed(cells, lines):
            problem = _OPEN
        elif len(cells) != width:
            problem = f"expected {width} columns, found {len(cells)}"
        elif any("\udc80" <= mark <= "\udcff" for cell in cells if not cell.isascii() for mark in cell):
            problem = "not UTF-8"
        else:
            return TableRow(number=number, offset=offset, cells=dict(zip(self.header, cells, strict=True)))
        return TableRow(number=number, offset=offset, problem=problem)


def _is_closed(cells: list[str], lines: list[str]) -> bool:
    """Return whether all quotes of a row are closed before a tab or a line end.

    Within one line others are harmless (`"New" York` is read as `New York`, as pandas does); over several lines they
    mean that quotes of the next rows have closed what this row left open.
    """
    if len(lines) == 1:
        return not cells[-1].endswith("\n")  # the file ends inside a quoted cell
    try:
        return len(list(csv.reader(lines, delimiter="\t", strict=True))) == 1
    except csv.Error:
        return False


class _Lines:
    """Lines of a file as text, with the `offset` behind the last, which csv's reader does not give.

    `taken` are the lines of the row that is being read, and `first_end` is the byte behind the first of them.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.offset = self.first_end = stream.tell()
        self.taken: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        room = MAX_CONTINUED - (self.offset - self.first_end) if self.taken else -1
        line = self._stream.readline(room + 1 if self.taken else -1)
        if not line:
            raise StopIteration
        begin, self.offset = self.offset, self.offset + len(line)
        # Bytes that are not UTF-8 make only this row invalid.
        text = line.decode("utf-8", "surrogateescape").removeprefix("" if begin else "\ufeff")
        if not self.taken:
            self.first_end = self.offset
        self.taken.append(text)
        if len(line) > room >= 0:
            raise csv.Error(f"{_OPEN}, for more than {MAX_CONTINUED:,} bytes")
        return text
