"""Rows of parquet files, a few at a time: a row group of images may be larger than the memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.text_files import HEAD_BYTES, content_kind, require_unique_columns

from ...shards.columns import Schema
from ...storage.stored_files import StoredFile, fetch_file, local_copy
from .source import SourceSample

BATCH_ROWS = 8
"""Rows that are decoded together: with images of a megabyte, tens of megabytes of memory."""
BUFFER_BYTES = 1 << 20
"""Bytes of each column that are read at a time; without it pyarrow reads the whole column of a row group."""


@dataclass(frozen=True, kw_only=True)
class ParquetRows:
    """Rows of parquet files of one schema as raw data; a subclass converts one row."""

    files: tuple[StoredFile, ...]
    fetched: Path = field(repr=False)  # folder of the copies of remote files
    name: str
    source: str
    license: str
    schema: ClassVar[Schema]  # columns that a file must have
    optional: ClassVar[tuple[str, ...]] = ()  # columns that are read if present; others are not read

    def inputs(self) -> Iterator[Path]:
        return (Path(file.path) for file in self.files if file.local)

    def num_rows(self) -> int | None:
        """Check the columns of all files, and return their rows; of remote files only the first one is checked."""
        remote = next((file for file in self.files if not file.local), None)
        if remote is not None:
            self._read_footer(remote, fetch_file(remote, self.fetched))
            return None
        return sum(self._read_footer(file, Path(file.path))[1] for file in self.files)

    def parts(self) -> tuple[StoredFile, ...]:
        return self.files

    def rows(self, part: StoredFile) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the rows of a file, each with the name that errors give it; a remote file is fetched first."""
        with local_copy(part, self.fetched) as path:
            columns, _ = self._read_footer(part, path)
            with _parquet_file(path, part) as table:
                there = set(table.schema_arrow.names)
                wanted = [*columns.values(), *(name for name in self.optional if name in there)]
                yield from _rows(table, part, dict.fromkeys(wanted))

    def sample(self, row: tuple[str, dict[str, Any]]) -> SourceSample:
        where, cells = row
        return self.convert(cells, self.schema.resolve(cells, where=where), where=where)

    def convert(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row, or raise SampleError where it is invalid.

        Args:
            row: Cells of the columns that are read.
            columns: Field of the schema -> its column.
            where: Name of the row in errors.
        """
        raise NotImplementedError

    def check_columns(self, columns: Mapping[str, str], *, where: str) -> None:
        """Raise ConfigError where the columns of a file (field of the schema -> column) need a missing setting."""

    def _read_footer(self, file: StoredFile, path: Path) -> tuple[dict[str, str], int]:
        """Check the columns of a file; return field of the schema -> column, and its number of rows."""
        with _parquet_file(path, file) as table:
            require_unique_columns(table.schema_arrow.names, where=file.path)
            columns = self.schema.resolve(table.schema_arrow.names, where=file.path)
            _require_bytes(table.schema_arrow, {"image", "images", columns.get("images")}, where=file.path)
            self.check_columns(columns, where=file.path)
            return columns, int(table.metadata.num_rows)


def _require_bytes(schema: Any, columns: Collection[str | None], *, where: str) -> None:
    """Raise DataError where a column of images holds lists of numbers, which are no lists of images."""
    for column in schema:
        if column.name in columns and _is_numbers(column.type):
            raise DataError(
                f"{where}: column {column.name!r} is {column.type}, expected the bytes of images (binary); convert its "
                "cells with bytes(cell)"
            )


def _is_numbers(kind: Any, listed: bool = False) -> bool:
    """Whether a type is a list of integers, in the field ``bytes`` of a struct, too."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_numbers(kind.value_type, listed=True)
    if types.is_struct(kind) and (held := kind.get_field_index("bytes")) >= 0:
        return _is_numbers(kind.field(held).type, listed)
    return listed and bool(types.is_integer(kind))


def _rows(table: Any, file: StoredFile, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
            for row in batch.to_pylist():
                yield f"{file.path}, row {number}", row
                number += 1
    except MemoryError:
        raise
    except Exception as error:  # pyarrow's errors have no common class
        message = f"{file.path} does not read after row {number} ({_first_line(error)}); fetch the file again"
        raise DataError(message) from error


@contextmanager
def _parquet_file(path: Path, file: StoredFile) -> Iterator[Any]:
    """Open a file, by a stream: pyarrow takes no name that is not UTF-8."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow: pip install 'alignvlm_pl[prepare]'") from error
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{file.path} cannot be opened: {error.strerror}") from error
    with stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except Exception as error:  # as in _rows
            stream.seek(0)
            kind = content_kind(stream.read(HEAD_BYTES))
            found = f"it is {kind}" if kind and kind != "a parquet file" else _first_line(error)
            size = path.stat().st_size
            raise DataError(
                f"{file.path} is not a complete parquet file of {size} bytes ({found}); fetch it again"
            ) from error
        yield table


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
