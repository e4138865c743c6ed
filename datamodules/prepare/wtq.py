"""`prepare wtq`: WikiTableQuestions -> page images and questions.

Format: ppasupat/WikiTableQuestions 1.0.2, `data/<split>.tsv`, `tagged/data/<split>.tagged`, `csv/<n>-csv/<m>.csv` and
`.html`. A folder with a `questions.jsonl` of id, question, context and answers is taken as well.
"""

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignvlm_pl.errors import DataError

from ..lines import numbered_lines
from ..sample import SampleError
from .table_questions import LoadTable, TableQuestion, TableSet, add_options, read_bigdocs_rows, write_tables
from .tables import Table

_FILES = {"test": "pristine-unseen-tables", "train": "random-split-1-train", "dev": "random-split-1-dev"}
_ORIGIN = "https://github.com/ppasupat/WikiTableQuestions/releases (WikiTableQuestions-1.0.2-compact.zip)"
_ESCAPES = {"\\n": "\n", "\\p": "|", "\\\\": "\\"}


def main(argv: Sequence[str]) -> int:
    """Run `prepare wtq`."""
    parser = argparse.ArgumentParser(prog="prepare wtq", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument(
        "--markup",
        choices=("html", "csv"),
        default="html",
        help="draw the page's own HTML, or its cells; default html",
    )
    options = parser.parse_args(argv)
    if options.bigdocs:
        questions = read_bigdocs_rows(options.bigdocs, table_names(options.folder))
    else:
        questions = list(read_questions(options.folder, options.split))
    chosen = TableSet(
        name="wtq",
        benchmark="wtq" if options.split == "test" and not options.bigdocs else "",
        license="CC BY-SA 4.0",
        questions=questions,
    )
    write_tables(chosen, WikiTable(folder=options.folder, html=options.markup == "html"), options)
    return 0


def table_names(folder: Path) -> Iterator[str]:
    """Yield the names of the release's tables."""
    return (f"{path.parent.name}/{path.stem}" for path in (folder / "csv").glob("*/*.csv"))


def all_tables(folder: Path) -> "WikiTable":
    """Return the tables of all splits, drawn from the pages' own HTML where it is there."""
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
    for number, text in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            name, question, context, answers = _json_line(text) if path == listed else _tsv_line(text)
        except (ValueError, KeyError, TypeError) as error:
            yield SampleError(f"{where}: expected id, question, table and answers ({error!r})", "bad_row")
            continue
        if name == "id" and path != listed:
            continue
        if not answers or answers == ("",):
            yield SampleError(f"{where}: no answer", "no_answer")
            continue
        meta = {"canonical": canonical[name]} if name in canonical else {}
        yield TableQuestion(name=name, table=_table_name(context), text=question, answers=answers, meta=meta)


def _json_line(text: str) -> tuple[str, str, str, tuple[str, ...]]:
    row = json.loads(text)
    return row["id"], row["question"], row["context"], tuple(row["answers"])


def _tsv_line(text: str) -> tuple[str, str, str, tuple[str, ...]]:
    name, question, context, answers = text.split("\t")
    return name, unescape(question), context, tuple(unescape(item) for item in answers.split("|"))


def unescape(text: str) -> str:
    r"""Undo the release's escapes: ``\n`` line end, ``\p`` vertical bar, ``\\`` backslash."""
    pieces, rest = [], text
    while rest:
        if rest[:2] in _ESCAPES:
            pieces.append(_ESCAPES[rest[:2]])
            rest = rest[2:]
        else:
            pieces.append(rest[0])
            rest = rest[1:]
    return "".join(pieces)


def _canonical(path: Path) -> dict[str, list[str]]:
    """Question -> canonical forms of its answers, where the release's tagged file is there."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {
            row["id"]: [unescape(item) for item in (row.get("targetCanon") or "").split("|")] for row in rows
        }


def _table_name(context: str) -> str:
    return context.removeprefix("csv/").removesuffix(".csv")


@dataclass(frozen=True, kw_only=True)
class WikiTable(LoadTable):
    """Tables of the release.

    Attributes:
        folder: Folder of the release.
        html: Whether to draw the page's own HTML where it is there.
    """

    folder: Path
    html: bool = True

    def __call__(self, name: str) -> Table:
        """Read a table, for example ``203-csv/393``."""
        path = self.folder / "csv" / f"{name}.csv"
        try:
            with path.open(encoding="utf-8", newline="") as stream:
                rows = list(csv.reader(stream, escapechar="\\", doublequote=False))
            page = path.with_suffix(".html")
            markup = page.read_text("utf-8") if self.html and page.is_file() else ""
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SampleError(f"table {path} does not read: {error}", "unreadable_table") from error
        return Table(name=name, rows=rows, markup=markup)
