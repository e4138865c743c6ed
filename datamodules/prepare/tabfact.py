"""`prepare tabfact`: Table-Fact-Checking -> page images and statements, to be answered True or False.

Format: wenhuchen/Table-Fact-Checking, `tokenized_data/<split>_examples.json` and `data/all_csv/*.csv`, cells separated
by `#`. A folder with a `statements.jsonl` of table, statement, label and caption, and `csv/`, is taken as well.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError

from ..lines import numbered_lines
from ..sample import SampleError
from .table_questions import LoadTable, TableQuestion, TableSet, add_options, read_bigdocs_rows, write_tables
from .tables import Table

_SPLITS = {"train": "train", "dev": "val", "test": "test"}
_ORIGIN = "https://github.com/wenhuchen/Table-Fact-Checking"
_LABELS = {0: "False", 1: "True"}


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
    chosen = TableSet(
        name="tabfact",
        benchmark="tabfact" if options.split == "test" and not options.bigdocs else "",
        license="CC BY 4.0",
        questions=questions,
    )
    write_tables(chosen, tables, options)
    return 0


def table_names(folder: Path) -> Iterator[str]:
    """Yield the names of the release's tables."""
    return (path.name for path in _csv_folder(folder).glob("*.csv"))


def all_tables(folder: Path) -> "FactTable":
    """Return the tables of all splits with their captions: rows of BigDocs may be about any of them."""
    captions: dict[str, str] = {}
    for split in _SPLITS:
        if _statements(folder, split).is_file():
            list(read_statements(folder, split, captions))
    return FactTable(folder=_csv_folder(folder), captions=captions)


def read_statements(
    folder: Path, split: str, captions: dict[str, str]
) -> Iterator[TableQuestion | SampleError]:
    """Read the statements of a split; the captions of their tables are put into `captions`.

    Raises:
        DataError: The file of the split is missing or no JSON.
    """
    path = _statements(folder, split)
    if not path.is_file():
        raise DataError(f"there is no {path}; fetch the repository from {_ORIGIN}")
    try:
        rows = list(_listed(path) if path.suffix == ".jsonl" else _examples(path))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} does not read as statements of TabFact: {error!r}") from error
    counts: dict[str, int] = {}
    for table, statement, label, caption in rows:
        captions[table] = caption
        counts[table] = counts.get(table, 0) + 1
        name = f"{table}/{counts[table] - 1}"
        if label not in _LABELS or not statement:
            yield SampleError(
                f"{path}, {name}: expected a statement and a label of 0 or 1, found {label!r}", "bad_row"
            )
            continue
        yield TableQuestion(name=name, table=table, text=statement, answers=(_LABELS[label],))


def _statements(folder: Path, split: str) -> Path:
    """Return the file of a split: the release's, or the one list of an extract."""
    listed = folder / "statements.jsonl"
    return listed if listed.is_file() else folder / "tokenized_data" / f"{_SPLITS[split]}_examples.json"


def _listed(path: Path) -> Iterator[tuple[str, str, Any, str]]:
    for _, text in numbered_lines(path):
        row = json.loads(text)
        yield row["table"], row["statement"], row["label"], row.get("caption", "")


def _examples(path: Path) -> Iterator[tuple[str, str, Any, str]]:
    for table, (statements, labels, caption) in json.loads(path.read_text("utf-8")).items():
        yield from (
            (table, statement, label, caption) for statement, label in zip(statements, labels, strict=True)
        )


def _csv_folder(folder: Path) -> Path:
    """Return where the tables lie: the release's place, or that of an extract."""
    return folder / "data" / "all_csv" if (folder / "data" / "all_csv").is_dir() else folder / "csv"


@dataclass(frozen=True, kw_only=True)
class FactTable(LoadTable):
    """Tables of the release.

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
        except (OSError, DataError) as error:
            raise SampleError(f"table {path} does not read: {error}", "unreadable_table") from error
        return Table(name=name, rows=[line.split("#") for line in lines], caption=self.captions.get(name, ""))
