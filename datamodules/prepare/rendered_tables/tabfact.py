"""`prepare tabfact`: Table-Fact-Checking -> page images and statements, to be answered True or False.

Format: wenhuchen/Table-Fact-Checking, `tokenized_data/<split>_examples.json` and `data/all_csv/*.csv`, cells separated
by `#`. A folder with a `statements.jsonl` of table, statement, label and caption, and `csv/`, is also read.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.images.source import describe_source
from alignvlm_pl.utils.text_files import decode_text

from ...shards.sample import SampleError
from ..sources.json_files import is_text, json_lines, numbered_lines
from .table_questions import TableQuestion, add_options, read_bigdocs_rows, write_tables
from .tables import Table

_SPLITS = {"train": "train", "dev": "val", "test": "test"}
_ORIGIN = "https://github.com/wenhuchen/Table-Fact-Checking"
_LABELS = {0: "False", 1: "True"}
_Row = tuple[Any, Any, Any, Any]
"""Table, statement, label and caption, of whatever types the file has."""


def main(argv: Sequence[str]) -> int:
    """Run `prepare tabfact`."""
    parser = argparse.ArgumentParser(prog="prepare tabfact", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    options = parser.parse_args(argv)
    if options.bigdocs:
        tables = all_tables(options.folder)
        questions = read_bigdocs_rows(options.bigdocs, table_names(options.folder))
    else:
        captions: dict[str, str] = {}
        questions = list(read_statements(options.folder, options.split, captions))
        tables = FactTable(folder=_csv_folder(options.folder), captions=captions)
    write_tables(questions, tables, options, name="tabfact", license="CC BY 4.0")
    return 0


def table_names(folder: Path) -> Iterator[str]:
    """Yield the names of the release's tables."""
    return (path.name for path in _csv_folder(folder).glob("[!.]*.csv"))


def all_tables(folder: Path) -> "FactTable":
    """Return the tables of all splits with their captions: rows of BigDocs may be about any of them."""
    captions: dict[str, str] = {}
    for split in _SPLITS:
        if _statements(folder, split).is_file():
            list(read_statements(folder, split, captions))
    return FactTable(folder=_csv_folder(folder), captions=captions)


def read_statements(folder: Path, split: str, captions: dict[str, str]) -> Iterator[TableQuestion | SampleError]:
    """Read the statements of a split; the captions of their tables are put into `captions`.

    Raises:
        DataError: The file of the split is missing or no JSON.
    """
    path = _statements(folder, split)
    if not path.is_file():
        raise DataError(f"there is no {path}; fetch the repository from {_ORIGIN}")
    counts: Counter[str] = Counter()
    for where, row in _listed(path) if path.suffix == ".jsonl" else _examples(path):
        if isinstance(row, SampleError):
            yield row
            continue
        table, statement, label, caption = row
        if problem := _problem(table, statement, label, caption):
            yield SampleError(f"{where}: {problem}", "bad_row")
            continue
        captions[table] = caption
        counts[table] += 1
        name = f"{table}/{counts[table] - 1}"
        yield TableQuestion(name=name, table=table, text=statement, references=(_LABELS[label],))


def _problem(table: object, statement: object, label: object, caption: object) -> str:
    """Return the problem of a row; empty if it is valid."""
    if not is_text(table):
        return f"expected the name of a table, found {table!r:.60}"
    if not is_text(statement):
        return f"expected a statement, found {statement!r:.60}"
    if type(label) is not int or label not in _LABELS:
        return f"expected a label of 0 or 1, found {label!r:.60}"
    if caption != "" and not is_text(caption):
        return f"expected a caption, found {caption!r:.60}"
    return ""


def _statements(folder: Path, split: str) -> Path:
    """Return the file of a split: that of the release, or the list of an extract."""
    listed = folder / "statements.jsonl"
    return listed if listed.is_file() else folder / "tokenized_data" / f"{_SPLITS[split]}_examples.json"


def _listed(path: Path) -> Iterator[tuple[str, _Row | SampleError]]:
    for where, row in json_lines(path):
        if isinstance(row, SampleError):
            yield where, row
        else:
            yield where, (row.get("table"), row.get("statement"), row.get("label"), row.get("caption", ""))


def _examples(path: Path) -> Iterator[tuple[str, _Row | SampleError]]:
    try:
        # As pairs, since a mapping would drop repeated tables.
        tables = json.loads(decode_text(path.read_bytes()), object_pairs_hook=list)
        pairs = [(table, entry) for table, entry in tables]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} does not read as statements of TabFact: {error!r}") from error
    seen = set()
    for table, entry in pairs:
        where = f"{path}, {table}"
        try:
            statements, labels, caption = entry
            found = list(zip(statements, labels, strict=True))
        except (ValueError, TypeError) as error:
            problem = f"{where}: expected statements, as many labels, and a caption ({error})"
            yield where, SampleError(problem, "bad_row")
            continue
        if table in seen:
            yield where, SampleError(f"{where}: a repeated table", "repeated_table")
            continue
        seen.add(table)
        for number, (statement, label) in enumerate(found):
            yield f"{where}/{number}", (table, statement, label, caption)


def _csv_folder(folder: Path) -> Path:
    """Return the folder of the tables: that of the release, or of an extract."""
    return folder / "data" / "all_csv" if (folder / "data" / "all_csv").is_dir() else folder / "csv"


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """Loads the tables of the release (`LoadTable`).

    Attributes:
        folder: Folder of the csv files.
        captions: Table -> its caption.
    """

    folder: Path
    captions: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, name: str) -> Table:
        """Read a table, for example ``2-17406982-2.html.csv``."""
        path = self.folder / name
        try:
            lines = [text for _, text in numbered_lines(path)]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SampleError(f"table {describe_source(path)} does not read: {reason}", "unreadable_table") from error
        return Table(name=name, rows=[line.split("#") for line in lines], caption=self.captions.get(name, ""))
