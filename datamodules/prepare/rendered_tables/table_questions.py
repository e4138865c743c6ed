"""Questions about rendered tables -> shards; shared by `prepare wtq` and `prepare tabfact`."""

import argparse
import csv
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.images.source import describe_source

from ...shards.manifest import Manifest, load_manifest
from ...shards.sample import SampleError
from ...shards.sample_formats import as_list, conversation
from ...shards.skipped_rows import SkippedRows, print_skipped_rows
from ...shards.writer import ShardWriter
from ..pack.options import require_at_least
from ..sources.json_files import is_text, json_lines
from .tables import Table, render_table, to_png

_AHEAD = 4  # tables per worker, rendered ahead of the writer


@dataclass(frozen=True, kw_only=True, slots=True)
class TableQuestion:
    """A question about a table, or a statement to be judged."""

    name: str
    table: str  # name of the table
    text: str
    references: tuple[str, ...]  # all items of the reference
    meta: Mapping[str, Any] = field(default_factory=dict)  # what its benchmark needs for scoring


@dataclass(frozen=True, kw_only=True)
class TableRelease(ABC):
    """Tables and questions about them, as published in a folder. It is pickled into workers."""

    folder: Path
    name: ClassVar[str]  # of the shards, and of the benchmark that the questions of the test split are
    license: ClassVar[str]

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Return the names of all tables, and prepare to load any of them."""

    @abstractmethod
    def questions(self, split: str) -> Iterator[TableQuestion | SampleError]:
        """Read the questions of a split, and the errors of invalid rows; raises DataError for its file as a whole."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Return the file of a table."""

    @abstractmethod
    def read(self, name: str) -> Table:
        """Read the file of a table."""

    def load(self, name: str) -> Table:
        """Read a table; raises SampleError where it is missing or cannot be read."""
        try:
            return self.read(name)
        except (OSError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or error
            where = describe_source(self.path(name))
            raise SampleError(f"table {where} does not read: {reason}", "unreadable_table") from error


def require_texts(row: Mapping[str, Any], *keys: str, where: str) -> None:
    """Raise SampleError where a field of a row is not text, or blank."""
    for key in keys:
        if not is_text(row.get(key)):
            raise SampleError(f"{where}: expected text as {key}, found {row.get(key)!r:.60}", "bad_row")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands share."""
    parser.add_argument("folder", type=Path, help="folder of the release")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"), help="default: %(default)s")
    parser.add_argument("--conversations", action="store_true", help="one sample a table, its questions as turns")
    parser.add_argument(
        "--bigdocs", type=Path, help="jsonl rows of BigDocs-7.5M with img_id, query and annotations, asked instead"
    )
    parser.add_argument("--limit", type=int, help="only the first tables")
    parser.add_argument("--workers", type=int, default=1, help="processes that render; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")


def write_tables(release: TableRelease, options: argparse.Namespace) -> Manifest:
    """Render tables and write their questions as shards, with options of `add_options`; invalid ones are counted.

    Raises:
        ConfigError: An option is below 1.
        DataError: Questions cannot be read, or nothing could be written.
    """
    require_at_least(1, limit=options.limit, workers=options.workers)
    if options.bigdocs:
        questions = read_bigdocs_rows(options.bigdocs, release.names())
    else:
        questions = release.questions(options.split)
    name = release.name
    skipped = SkippedRows()
    by_table: dict[str, list[TableQuestion]] = {}
    for question in questions:
        if isinstance(question, SampleError):
            skipped.skip(question)
        else:
            by_table.setdefault(question.table, []).append(question)
    names = list(by_table)[: options.limit]
    with ShardWriter(
        options.out, name=name, source=name, license=release.license, overwrite=options.overwrite
    ) as writer:
        for table, pages in zip(names, _render_all(names, release, options.workers), strict=True):
            if isinstance(pages, SampleError):
                skipped.skip(pages, len(by_table[table]))
                continue
            for record in _records(by_table[table], len(pages), conversations=options.conversations):
                writer.add(record, pages, ["png"] * len(pages))
        skipped.require_written(writer.num_samples, options.folder)
        writer.extra |= {"split": options.split} | skipped.extra()
        if options.split == "test" and not (options.bigdocs or options.conversations):
            writer.extra["benchmark"] = name
    skipped.write(options.out)
    manifest = load_manifest(options.out)
    sys.stdout.write(f"{manifest.num_samples} samples of {len(names)} tables: {manifest.folder}\n")
    print_skipped_rows(manifest.extra)
    return manifest


def read_bigdocs_rows(path: Path, names: Iterable[str]) -> Iterator[TableQuestion | SampleError]:
    """Yield rows of BigDocs-7.5M's table configs, which come without images, as questions.

    A row's ``img_id`` names its table (`TableNames`). Raises DataError where there is no such file.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}; expected rows of BigDocs-7.5M as jsonl")
    tables = TableNames.from_names(names)
    asked: Counter[str] = Counter()
    for where, row in json_lines(path):
        if isinstance(row, SampleError):
            yield row
            continue
        queries, answers = (as_list(row.get(key)) for key in ("query", "annotations"))
        if not is_text(row.get("img_id")) or not queries or not answers or not all(map(is_text, [*queries, *answers])):
            problem = f"{where}: expected texts as img_id, query and annotations, found {row!r:.200}"
            yield SampleError(problem, "bad_row")
            continue
        given = plain_name(row["img_id"])
        table = tables.find(given)
        if table is None or len(queries) != len(answers):
            problem = "names no table of the release" if table is None else "has not as many answers as questions"
            yield SampleError(f"{where}: img_id {row['img_id']!r} {problem}", "unknown_table")
            continue
        for query, answer in zip(queries, answers, strict=True):
            name = f"{given}/{asked[given]}"
            yield TableQuestion(name=name, table=table, text=query, references=(answer,))
            asked[given] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TableNames:
    """Names of a release's tables, found by what BigDocs' `img_id` holds: a name without endings (`whole`), or its last
    part, where that is unique (`last`).
    """

    whole: Mapping[str, str]
    last: Mapping[str, str]

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "TableNames":
        """Index names."""
        whole = {plain_name(name): name for name in sorted(names)}
        counts = Counter(name.rpartition("/")[2] for name in whole)
        last = {name.rpartition("/")[2]: full for name, full in whole.items() if counts[name.rpartition("/")[2]] == 1}
        return cls(whole=whole, last=last)

    def find(self, name: str) -> str | None:
        """Return the table of a name; None if it is missing or ambiguous."""
        plain = plain_name(name)
        return self.whole.get(plain) or self.last.get(plain.rpartition("/")[2])


def plain_name(name: str) -> str:
    """Return the name of a table without endings and the folder that all are in."""
    for ending in (".html.csv", ".csv", ".html", ".png", ".jpg"):
        name = name.removesuffix(ending)
    return name.removeprefix("csv/")


def _records(questions: Sequence[TableQuestion], num_pages: int, *, conversations: bool) -> Iterator[dict[str, Any]]:
    if conversations:
        pairs = [(question.text, ", ".join(question.references)) for question in questions]
        turns, table = conversation(pairs, num_images=num_pages), questions[0].table
        yield {"id": table, "task": "table_qa", "messages": turns, "meta": {"table": table}}
        return
    for question in questions:
        yield {
            "id": question.name,
            "task": "table_qa",
            "messages": conversation([(question.text, "")], num_images=num_pages)[:1],
            "references": list(question.references),
            "meta": {"table": question.table, "index": question.name, **question.meta},
        }


def _render_all(names: Sequence[str], release: TableRelease, workers: int) -> Iterator[list[bytes] | SampleError]:
    """Render tables in order, in this process or a few ahead in workers."""
    if workers <= 1:
        yield from (_render_one(name, release) for name in names)
        return
    with ProcessPoolExecutor(workers) as pool:
        step = workers * _AHEAD  # pool.map over all names would render all tables ahead of the writer
        for start in range(0, len(names), step):
            part = names[start : start + step]
            yield from pool.map(_render_one, part, [release] * len(part))


def _render_one(name: str, release: TableRelease) -> list[bytes] | SampleError:
    try:
        return [to_png(page) for page in render_table(release.load(name))]
    except SampleError as error:
        return error
