"""Rows of parquet files, a few at a time: a row group of images may be larger than the memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.text_files import HEAD_BYTES, content_kind, require_unique_columns

from ...shards.columns import Schema
from ...shards.sample import SampleError
from ...storage.stored_files import StoredFile, short_names
from .source import Part, SourceSample, or_error

BATCH_ROWS = 8
"""Rows that are decoded together: with images of a megabyte, tens of megabytes of memory."""
BUFFER_BYTES = 1 << 20
"""Bytes of each column that are read at a time; without it pyarrow reads the whole column of a row group."""
_FOOTERS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class ParquetRows:
    """Rows of parquet files of one schema as raw data; a subclass converts one row."""

    files: tuple[StoredFile, ...]
    name: str
    source: str
    license: str
    schema: ClassVar[Schema]  # columns that a file must have
    optional: ClassVar[tuple[str, ...]] = ()  # columns that are read if present; others are not read

    def parts(self) -> list[Part]:
        """Return a part for each row group, in order; only the files' footers are read."""
        # Footers of remote files are one request each: latency dominates.
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE if any(not f.local for f in self.files) else 1) as pool:
            counts = list(pool.map(self._group_sizes, self.files))
        return [
            Part(name=f"{name}#{group}", payload=(file, group), rows=rows)
            for file, name, sizes in zip(self.files, short_names(self.files), counts, strict=True)
            for group, rows in enumerate(sizes)
        ]

    def input_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def read(self, part: Part) -> Iterator[SourceSample | SampleError]:
        file, group = part.payload
        with closing(file.open()) as stream:
            table = _parquet_file(stream, file)
            there = list(table.schema_arrow.names)
            columns = self.schema.resolve(there, where=file.path)
            wanted = [*columns.values(), *(name for name in self.optional if name in there)]
            for where, row in _rows(table, file, group, dict.fromkeys(wanted)):
                yield or_error(self.sample, row, columns, where=where)

    def sample(self, row: Mapping[str, Any], columns: Mapping[str, str], *, where: str) -> SourceSample:
        """Convert a row, or raise SampleError where it is invalid.

        Args:
            row: Cells of the columns that are read.
            columns: Field of the schema -> its column.
            where: Name of the row in errors.
        """
        raise NotImplementedError

    def check_columns(self, columns: Mapping[str, str], *, where: str) -> None:
        """Raise ConfigError where the columns of a file (field of the schema -> column) need a missing setting."""

    def _group_sizes(self, file: StoredFile) -> list[int]:
        with closing(file.open()) as stream:
            table = _parquet_file(stream, file)
            require_unique_columns(table.schema_arrow.names, where=file.path)
            columns = self.schema.resolve(table.schema_arrow.names, where=file.path)
            _require_bytes(table.schema_arrow, {"image", "images", columns.get("images")}, where=file.path)
            self.check_columns(columns, where=file.path)
            return [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]


def _require_bytes(schema: Any, columns: Collection[str | None], *, where: str) -> None:
    """Raise DataError where a column of images holds lists of numbers, which are no lists of images."""
    for field in schema:
        if field.name in columns and _is_numbers(field.type):
            raise DataError(
                f"{where}: column {field.name!r} is {field.type}, expected the bytes of images (binary); convert its "
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


def _rows(table: Any, file: StoredFile, group: int, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a row group, each with the name that errors give it."""
    batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's errors, and those of the store that the file lies in
            raise DataError(
                f"{file.path}: row group {group} does not read after row {number} ({_first_line(error)}); "
                "fetch the file again"
            ) from error
        if batch is None:
            return
        for row in batch.to_pylist():
            yield f"{file.path}, row group {group}, row {number}", row
            number += 1


def _parquet_file(stream: Any, file: StoredFile) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need pyarrow: pip install 'alignvlm_pl[prepare]'") from error
    try:
        return pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except Exception as error:  # as in _rows
        stream.seek(0)
        kind = content_kind(stream.read(HEAD_BYTES))
        found = f"it is {kind}" if kind and kind != "a parquet file" else _first_line(error)
        raise DataError(
            f"{file.path} is not a complete parquet file of {file.size} bytes ({found}); fetch it again"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]
