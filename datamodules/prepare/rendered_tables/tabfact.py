"""`prepare tabfact`: Table-Fact-Checking -> page images and statements, to be answered True or False.

Format: wenhuchen/Table-Fact-Checking, `tokenized_data/<split>_examples.json` and `data/all_csv/*.csv`, cells separated
by `#`. A folder with a `statements.jsonl` of table, statement, label and caption, and `csv/`, is also read.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.text_files import decode_text

from ...shards.sample import SampleError
from ..sources.json_files import json_lines, numbered_lines
from ..sources.source import or_error
from .table_questions import TableQuestion, TableRelease, add_options, require_texts, write_tables
from .tables import Table

_SPLITS = {"train": "train", "dev": "val", "test": "test"}
_ORIGIN = "https://github.com/wenhuchen/Table-Fact-Checking"
_LABELS = {0: "False", 1: "True"}


def main(argv: Sequence[str]) -> int:
    """Run `prepare tabfact`."""
    parser = argparse.ArgumentParser(prog="prepare tabfact", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    options = parser.parse_args(argv)
    write_tables(FactTables(folder=options.folder), options)
    return 0


@dataclass(frozen=True, kw_only=True)
class FactTables(TableRelease):
    """The release; `captions` of the tables are read with the statements about them."""

    name = "tabfact"
    license = "CC BY 4.0"
    captions: dict[str, str] = field(default_factory=dict, repr=False)

    def names(self) -> Iterator[str]:
        for split in _SPLITS:
            if self._statements(split).is_file():
                list(self.questions(split))  # for the captions
        return (path.name for path in self.path("").glob("[!.]*.csv"))

    def path(self, name: str) -> Path:
        """Return the file of a table, for example ``2-17406982-2.html.csv``, of the release or of an extract."""
        published = self.folder / "data" / "all_csv"
        return (published if published.is_dir() else self.folder / "csv") / name

    def read(self, name: str) -> Table:
        rows = [line.split("#") for _, line in numbered_lines(self.path(name))]
        return Table(name=name, rows=rows, caption=self.captions.get(name, ""))

    def questions(self, split: str) -> Iterator[TableQuestion | SampleError]:
        """Yield the statements of the release; raises a DataError where a file of it is missing."""
        path = self._statements(split)
        if not path.is_file():
            raise DataError(f"there is no {path}; fetch the repository from {_ORIGIN}")
        counts: Counter[str] = Counter()
        for where, row in json_lines(path) if path.suffix == ".jsonl" else _examples(path):
            yield or_error(self._question, row, counts, where=where)

    def _statements(self, split: str) -> Path:
        """Return the file of a split: that of the release, or the list of an extract."""
        listed = self.folder / "statements.jsonl"
        return listed if listed.is_file() else self.folder / "tokenized_data" / f"{_SPLITS[split]}_examples.json"

    def _question(self, row: dict[str, Any] | SampleError, counts: Counter[str], *, where: str) -> TableQuestion:
        if isinstance(row, SampleError):
            raise row
        require_texts(row, "table", "statement", where=where)
        table, label, caption = row["table"], row.get("label"), row.get("caption", "")
        if type(label) is not int or label not in _LABELS:
            raise SampleError(f"{where}: expected a label of 0 or 1, found {label!r:.60}", "bad_row")
        if caption != "":
            require_texts(row, "caption", where=where)
        self.captions[table] = caption
        counts[table] += 1
        name = f"{table}/{counts[table] - 1}"
        return TableQuestion(name=name, table=table, text=row["statement"], references=(_LABELS[label],))


def _examples(path: Path) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
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
            fields = {"table": table, "statement": statement, "label": label, "caption": caption}
            yield f"{where}/{number}", fields
