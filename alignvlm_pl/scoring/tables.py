"""Result tables of VLMEvalKit -> rows of text."""

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.scoring.tsv import TabTable

from .faults import Faults

Row = dict[str, str | None]


def table_rows(path: Path, faults: Faults) -> Iterator[tuple[str, Row]]:
    """Yield place and cells of the rows of a table; the header is row 1, empty cells are None.

    Args:
        path: An ``.xlsx``, ``.tsv`` or ``.json`` file.
        faults: Takes the rows that do not read.

    Raises:
        ConfigError: The file needs a package that is not installed.
        DataError: It does not read as a table.
    """
    try:
        if path.suffix == ".tsv":
            yield from _tsv_rows(path, faults)
        elif path.suffix == ".xlsx":
            yield from ((f"row {number}", row) for number, row in enumerate(_xlsx_rows(path), start=2))
        else:
            yield from _json_rows(json.loads(path.read_text("utf-8-sig")), faults)
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        if isinstance(error, (DataError, ConfigError)):
            raise
        raise DataError(f"{path} does not read as a table: {error}") from error


def _tsv_rows(path: Path, faults: Faults) -> Iterator[tuple[str, Row]]:
    for row in TabTable(path).rows():
        if row.problem:
            faults.add("broken rows", f"row {row.number}", row.problem)
        else:
            yield f"row {row.number}", {name: cell or None for name, cell in row.cells.items()}


def _xlsx_rows(path: Path) -> Iterator[Row]:
    import zipfile

    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ConfigError(
            f"{path}: xlsx files need openpyxl: pip install 'alignvlm_pl[benchmarks]'"
        ) from error
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    except (zipfile.BadZipFile, KeyError, IndexError) as error:
        raise DataError(f"{path} is no xlsx file: {error}") from error
    rows = sheet.iter_rows(values_only=True)
    header = [str(cell) for cell in next(rows, ())]
    for row in rows:
        # Rows of files that do not tell their own width end with their last filled cell.
        yield {name: _text(cell) for name, cell in zip_longest(header, row[: len(header)])}


def _json_rows(content: Any, faults: Faults) -> Iterator[tuple[str, Row]]:
    """Rows of a list of records, the first being record 1, or of columns: name -> row number -> cell."""
    if isinstance(content, Mapping):
        columns = {
            name: list(cells.values() if isinstance(cells, Mapping) else cells)
            for name, cells in content.items()
        }
        content = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not isinstance(content, list):
        raise ValueError("expected a list of rows")
    for number, row in enumerate(content, start=1):
        if isinstance(row, Mapping):
            yield f"record {number}", {str(name): _text(cell) for name, cell in row.items()}
        else:
            faults.add("records that are no objects", f"record {number}", f"{row!r:.60}")


def _text(cell: object) -> str | None:
    """Return a cell as text; whole numbers without a point, as tables show them."""
    if cell is None:
        return None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
