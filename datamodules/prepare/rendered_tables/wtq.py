"""`prepare wtq`: WikiTableQuestions -> page images and questions.

Format: ppasupat/WikiTableQuestions 1.0.2, `data/<split>.tsv`, `tagged/data/<split>.tagged`, `csv/<n>-csv/<m>.csv` and
`.html`. Also reads a folder with a `questions.jsonl` of id, question, context and answers.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import has_text
from alignvlm_pl.utils.text_files import require_line_feeds, require_unique_columns

from ...shards.sample import SampleError
from ..sources.json_files import is_text, json_lines
from ..sources.source import or_error
from .table_questions import TableQuestion, TableRelease, add_options, require_texts, write_tables
from .tables import Table

_FILES = {"test": "pristine-unseen-tables", "train": "random-split-1-train", "dev": "random-split-1-dev"}
_ORIGIN = "https://github.com/ppasupat/WikiTableQuestions/releases (WikiTableQuestions-1.0.2-compact.zip)"
_ESCAPES = {"\\n": "\n", "\\p": "|", "\\\\": "\\"}


def main(argv: Sequence[str]) -> int:
    """Run `prepare wtq`."""
    parser = argparse.ArgumentParser(prog="prepare wtq", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    help = "render the page's own HTML, or its cells; default html"
    parser.add_argument("--markup", choices=("html", "csv"), default="html", help=help)
    options = parser.parse_args(argv)
    write_tables(WikiTables(folder=options.folder, html=options.markup == "html"), options)
    return 0


@dataclass(frozen=True, kw_only=True)
class WikiTables(TableRelease):
    """The release; `html`: render the page's own HTML if present."""

    name = "wtq"
    license = "CC BY-SA 4.0"
    html: bool = True

    def names(self) -> Iterator[str]:
        return (f"{path.parent.name}/{path.stem}" for path in (self.folder / "csv").glob("*/[!.]*.csv"))

    def path(self, name: str) -> Path:
        return self.folder / "csv" / f"{name}.csv"

    def read(self, name: str) -> Table:
        path = self.path(name)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream, escapechar="\\", doublequote=False))
        page = path.with_suffix(".html")
        markup = page.read_text("utf-8-sig") if self.html and page.is_file() else ""
        return Table(name=name, rows=rows, markup=markup)

    def questions(self, split: str) -> Iterator[TableQuestion | SampleError]:
        """Yield the questions of the release; raises a DataError where a file of it is missing."""
        listed = self.folder / "questions.jsonl"
        path = listed if listed.is_file() else self.folder / "data" / f"{_FILES[split]}.tsv"
        if not path.is_file():
            raise DataError(f"there is no {path}; fetch the release from {_ORIGIN}")
        canonical = _canonical(self.folder / "tagged" / "data" / f"{_FILES[split]}.tagged")
        seen: set[str] = set()
        for where, row in json_lines(path) if path == listed else _tsv_lines(path):
            yield or_error(_question, row, canonical, seen, where=where)


def _question(
    row: dict[str, Any] | SampleError, canonical: Mapping[str, list[str]], seen: set[str], *, where: str
) -> TableQuestion:
    if isinstance(row, SampleError):
        raise row
    answers = row.get("answers")
    if isinstance(answers, list) and not has_text(answers):
        raise SampleError(f"{where}: no answer", "no_answer")
    require_texts(row, "id", "question", "context", where=where)
    if not isinstance(answers, list) or not all(answer == "" or is_text(answer) for answer in answers):
        raise SampleError(f"{where}: expected a list of texts as answers, found {answers!r:.60}", "bad_row")
    name = row["id"]
    if name in seen:
        raise SampleError(f"{where}: id {name!r} is that of an earlier question", "repeated_id")
    seen.add(name)
    table = row["context"].removeprefix("csv/").removesuffix(".csv")
    meta = {"canonical": canonical[name]} if name in canonical else {}
    return TableQuestion(name=name, table=table, text=row["question"], references=tuple(answers), meta=meta)


def _tsv_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | SampleError]]:
    require_line_feeds(path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if not text.strip():
                    continue
                name, question, context, answers = text.split("\t")
            except ValueError as error:
                problem = f"{where}: expected id, question, table and answers ({error})"
                yield where, SampleError(problem, "bad_row")
                continue
            if name != "id":
                fields = {"id": name, "question": unescape(question), "context": context}
                yield where, {**fields, "answers": list(map(unescape, answers.split("|")))}


def unescape(text: str) -> str:
    r"""Undo the release's escapes: ``\n`` line end, ``\p`` vertical bar, ``\\`` backslash."""
    return re.sub(r"\\[np\\]", lambda escape: _ESCAPES[escape[0]], text)


def _canonical(path: Path) -> dict[str, list[str]]:
    """Return question -> canonical forms of its answers; empty without the release's tagged file."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            require_unique_columns(rows.fieldnames or (), where=str(path))
            # References of questions without canonical forms are compared as they are.
            return {
                row["id"]: [unescape(item) for item in row["targetCanon"].split("|")]
                for row in rows
                if row.get("targetCanon")
            }
    except DataError:
        raise
    except (ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{path} does not read as a tagged file: {error!r}") from error
