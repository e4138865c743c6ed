"""`prepare wtq`: WikiTableQuestions -> page images and questions.

Format: ppasupat/WikiTableQuestions 1.0.2, `data/<split>.tsv`, `tagged/data/<split>.tagged`, `csv/<n>-csv/<m>.csv` and
`.html`. Also reads a folder with a `questions.jsonl` of id, question, context and answers.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import has_text
from alignvlm_pl.preprocessing.images.source import describe_source
from alignvlm_pl.utils.text_files import require_line_feeds, require_unique_columns

from ...shards.sample import SampleError
from ..sources.json_files import is_text, json_lines
from .table_questions import TableQuestion, add_options, read_bigdocs_rows, write_tables
from .tables import Table

_FILES = {"test": "pristine-unseen-tables", "train": "random-split-1-train", "dev": "random-split-1-dev"}
_ORIGIN = "https://github.com/ppasupat/WikiTableQuestions/releases (WikiTableQuestions-1.0.2-compact.zip)"
_Row = tuple[Any, Any, Any, Any]
"""Id, question, table and answers, of whatever types the file has."""
_ESCAPES = {"\\n": "\n", "\\p": "|", "\\\\": "\\"}


def main(argv: Sequence[str]) -> int:
    """Run `prepare wtq`."""
    parser = argparse.ArgumentParser(prog="prepare wtq", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    help = "render the page's own HTML, or its cells; default html"
    parser.add_argument("--markup", choices=("html", "csv"), default="html", help=help)
    options = parser.parse_args(argv)
    if options.bigdocs:
        questions = read_bigdocs_rows(options.bigdocs, table_names(options.folder))
    else:
        questions = list(read_questions(options.folder, options.split))
    tables = WikiTable(folder=options.folder, html=options.markup == "html")
    write_tables(questions, tables, options, name="wtq", license="CC BY-SA 4.0")
    return 0


def table_names(folder: Path) -> Iterator[str]:
    """Yield the names of the release's tables."""
    return (f"{path.parent.name}/{path.stem}" for path in (folder / "csv").glob("*/[!.]*.csv"))


def all_tables(folder: Path) -> "WikiTable":
    """Return the tables of all splits, rendered from the pages' own HTML if present."""
    return WikiTable(folder=folder)


def read_questions(folder: Path, split: str) -> Iterator[TableQuestion | SampleError]:
    """Read the questions of a split.

    Raises:
        DataError: The file of the split is missing.
    """
    listed = folder / "questions.jsonl"
    path = listed if listed.is_file() else folder / "data" / f"{_FILES[split]}.tsv"
    if not path.is_file():
        raise DataError(f"there is no {path}; fetch the release from {_ORIGIN}")
    canonical = _canonical(folder / "tagged" / "data" / f"{_FILES[split]}.tagged")
    seen = set()
    for where, row in _json_rows(path) if path == listed else _tsv_rows(path):
        if isinstance(row, SampleError):
            yield row
            continue
        name, question, context, answers = row
        if isinstance(answers, list) and not has_text(answers):
            yield SampleError(f"{where}: no answer", "no_answer")
        elif problem := _problem(name, question, context, answers):
            yield SampleError(f"{where}: {problem}", "bad_row")
        elif name in seen:
            yield SampleError(f"{where}: id {name!r} is that of an earlier question", "repeated_id")
        else:
            seen.add(name)
            meta = {"canonical": canonical[name]} if name in canonical else {}
            table = context.removeprefix("csv/").removesuffix(".csv")
            yield TableQuestion(name=name, table=table, text=question, references=tuple(answers), meta=meta)


def _problem(name: object, question: object, context: object, answers: object) -> str:
    """Return the problem of a row; empty if it is valid."""
    for what, value in (("id", name), ("question", question), ("table", context)):
        if not is_text(value):
            return f"expected text as {what}, found {value!r:.60}"
    if not isinstance(answers, list) or not any(map(is_text, answers)):
        return f"expected a list of texts as answers, found {answers!r:.60}"
    odd = [answer for answer in answers if answer != "" and not is_text(answer)]
    return f"expected texts as answers, found {odd[0]!r:.60}" if odd else ""


def _json_rows(path: Path) -> Iterator[tuple[str, _Row | SampleError]]:
    for where, row in json_lines(path):
        if isinstance(row, SampleError):
            yield where, row
        else:
            yield where, (row.get("id"), row.get("question"), row.get("context"), row.get("answers"))


def _tsv_rows(path: Path) -> Iterator[tuple[str, _Row | SampleError]]:
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
                yield where, (name, unescape(question), context, list(map(unescape, answers.split("|"))))


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


@dataclass(frozen=True, kw_only=True)
class WikiTable:
    """Loads the tables of the release (`LoadTable`).

    Attributes:
        folder: Folder of the release.
        html: Whether to render the page's own HTML if present.
    """

    folder: Path
    html: bool = True

    def __call__(self, name: str) -> Table:
        """Read a table, for example ``203-csv/393``."""
        path = self.folder / "csv" / f"{name}.csv"
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                rows = list(csv.reader(stream, escapechar="\\", doublequote=False))
            page = path.with_suffix(".html")
            markup = page.read_text("utf-8-sig") if self.html and page.is_file() else ""
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise SampleError(f"table {describe_source(path)} does not read: {reason}", "unreadable_table") from error
        return Table(name=name, rows=rows, markup=markup)
