"""Read files of predictions: the project's jsonl, and the result tables of VLMEvalKit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import answer_problem, read_row
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.vlmevalkit_tables import MISSING, reload_predictions
from alignvlm_pl.utils.skipped import SkippedSamples
from alignvlm_pl.utils.text_files import (
    compression,
    decode_text,
    parse_json,
    read_head,
    require_line_feeds,
    require_unique_columns,
    require_unpacked,
    wide_encoding,
)

from .problems import problems_by_reason
from .records import ERROR, Record, is_unread, to_sample, unread
from .tsv import TabTable

Row = dict[str, str | None]
_HEADER_ROWS = 20


@dataclass(kw_only=True, slots=True)
class PredictionFile:
    """Content of a prediction file: a sample for each valid row, in its order, and what else a reader must know.

    `places` has the place of each key, such as ``line 3``; `unread` the records of samples that could not be read when
    they were evaluated; `problems` the invalid rows by reason.
    """

    samples: list[EvalSample] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    unread: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, sample: EvalSample, place: str) -> None:
        self.samples.append(sample)
        earlier = self.places.get(sample.key)
        self.places[sample.key] = f"{earlier}, {place}" if earlier else place

    def named(self, key: str) -> str:
        """Return a key with its place in the file."""
        return f"{key} ({self.places[key]})" if key in self.places else key

    def scorable(self, benchmark: Benchmark, path: Path) -> list[EvalSample]:
        """Return the predictions that have references; the others become a problem of the file, which is at `path`.

        Raises:
            ConfigError: None has references.
            DataError: None belongs to the benchmark.
        """
        samples = [sample for sample in self.samples if sample.has_reference]
        if not samples:
            raise ConfigError(
                f"{path}: none of {len(self.samples)} predictions has references; give the dataset of its questions "
                "with --answers FOLDER"
            )
        if not any(benchmark.belongs(sample.meta) for sample in samples):
            wanted = ", ".join(f"{name} {value!r}" for name, value in benchmark.only.items())
            raise DataError(f"{path}: no row has {wanted}, so none belongs to {benchmark.name}")
        bare = [self.named(sample.key) for sample in self.samples if not sample.has_reference]
        self.problems += problems_by_reason({"predictions without references": bare})
        return samples


def read_predictions(path: Path, benchmark: Benchmark) -> PredictionFile:
    """Read the project's ``.jsonl``, or ``.xlsx``, ``.json`` or ``.tsv`` as VLMEvalKit writes its results.

    Raises:
        DataError: The file is missing, of another kind, or holds no prediction.
    """
    if not path.is_file():
        raise DataError(f"there is no prediction file {path}")
    known, ending = (".jsonl", ".xlsx", ".json", ".tsv"), path.suffix.lower()
    head = read_head(path)
    if ending != ".xlsx" or compression(head) != "zip":  # which a spreadsheet is
        require_unpacked(head, where=str(path))
    if ending not in known:
        raise DataError(
            f"{path}: expected a {', '.join(known)} file of predictions, found {path.suffix or 'no ending'}"
        )
    found, invalid = PredictionFile(), SkippedSamples(keep=None)
    if ending == ".jsonl":
        _read_jsonl(path, found, invalid)
    else:
        _read_table(path, benchmark, found, invalid)
    counts = Counter(sample.key for sample in found.samples)
    for key, count in counts.items():
        if count > 1:
            invalid.add("keys repeated, none of their rows counts", found.named(key))
    found.samples = [sample for sample in found.samples if counts[sample.key] == 1]
    found.problems += [*unread(found.unread), *problems_by_reason(invalid.messages)]
    if not found.samples:
        raise DataError(f"{path} holds no usable prediction{': ' if found.problems else ''}{'; '.join(found.problems)}")
    return found


def join_gold(found: PredictionFile, gold: Sequence[EvalSample]) -> PredictionFile:
    """Return the predictions in the order of the dataset, `gold`, with its question, references and meta.

    Unknown and missing keys are among the problems.
    """
    by_key = {sample.key: sample for sample in found.samples}
    # Tables made elsewhere have the row's index, not the keys of the dataset.
    by_index = {str(sample.meta.get("index")): sample for sample in found.samples if "index" in sample.meta}
    named = {record["key"] for record in found.unread}
    missing, samples, used = [], [], set()
    for sample in gold:
        match = by_key.get(sample.key) or by_index.get(str(sample.meta.get("index")))
        if match is not None:
            used.add(match.key)
            samples.append(replace(sample, prediction=match.prediction))
        elif sample.key not in named:
            missing.append(sample.key)
    unknown = [found.named(sample.key) for sample in found.samples if sample.key not in used]
    unmatched = problems_by_reason({"predictions missing": missing, "keys that the dataset does not have": unknown})
    return replace(found, samples=samples, problems=[*found.problems, *unmatched])


def _read_jsonl(path: Path, found: PredictionFile, invalid: SkippedSamples) -> None:
    require_line_feeds(path)
    wide = wide_encoding(read_head(path))
    with path.open("rb") as stream:
        lines = decode_text(stream.read()).encode("utf-8", "surrogatepass").split(b"\n") if wide else stream
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line.decode("utf-8-sig"))
                if isinstance(record, dict) and is_unread(record):
                    empty: Record = {"key": record.get("key"), "prediction": "", "references": [], "meta": {}}
                    to_sample(empty)  # raises where the key is invalid
                    found.unread.append(empty | {ERROR: record[ERROR]})
                else:
                    found.add(to_sample(record), f"line {number}")
            except (ValueError, RecursionError) as error:
                invalid.add("lines that are no prediction record", f"line {number} ({error})")


def _read_table(path: Path, benchmark: Benchmark, found: PredictionFile, invalid: SkippedSamples) -> None:
    columns: dict[str, None] = {}
    ending = path.suffix.lower()
    for place, row in _table_rows(path, invalid, found.notes):
        columns |= dict.fromkeys(row)
        index = row.get("index") or ""
        if not index:
            invalid.add("rows without index", place)
            continue
        if "prediction" not in row:
            invalid.add("rows without prediction", place)
            continue
        cells = {name: text or "" for name, text in row.items()}
        if ending != ".json" and cells.get("answer") in MISSING - {""}:
            cells["answer"] = "nan"  # as pandas reads it: see `_reload`
        question, references, meta = read_row(cells, benchmark)
        if benchmark.belongs(meta) and (problem := answer_problem(cells, benchmark)):
            invalid.add("rows whose answer is no option", f"{place} ({problem})")
            continue
        prediction = row["prediction"] or ""
        sample = EvalSample(
            key=index, prediction=prediction, references=tuple(references), question=question, meta=meta
        )
        found.add(sample, place)
    if columns and "prediction" not in columns:
        raise DataError(f"{path} has no column 'prediction' (found: {', '.join(columns)}): is it a result table?")
    if ending != ".json":
        _reload(found)


def _reload(found: PredictionFile) -> None:
    """Replace the predictions by what VLMEvalKit itself reads: some change in its xlsx and tsv files."""
    given = [sample.prediction for sample in found.samples]
    reloaded = reload_predictions(given)
    found.samples = [replace(sample, prediction=text) for sample, text in zip(found.samples, reloaded, strict=True)]
    if changed := sum(before != after for before, after in zip(given, reloaded, strict=True)):
        found.notes.append(f"{changed} predictions change in VLMEvalKit's table file, and are scored as it reads them")


def _table_rows(path: Path, invalid: SkippedSamples, notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yield place and cells of the rows of an xlsx, tsv or json table; the header is row 1, empty cells are None."""
    try:
        if path.suffix.lower() == ".tsv":
            yield from _tsv_rows(path, invalid)
        elif path.suffix.lower() == ".xlsx":
            yield from _xlsx_rows(path, notes)
        else:
            yield from _json_rows(parse_json(decode_text(path.read_bytes())), invalid)
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        if isinstance(error, (DataError, ConfigError)):
            raise
        raise DataError(f"{path} does not read as a table: {error}") from error


def _tsv_rows(path: Path, invalid: SkippedSamples) -> Iterator[tuple[str, Row]]:
    for row in TabTable(path).rows():
        if row.problem:
            invalid.add("broken rows", f"row {row.number} ({row.problem})")
        else:
            yield f"row {row.number}", {name: cell or None for name, cell in row.cells.items()}


def _xlsx_rows(path: Path, notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of the sheet that has a column of predictions; of the first sheet where none has."""
    import zipfile

    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ConfigError(f"{path}: xlsx files need openpyxl: pip install 'alignvlm_pl[benchmarks]'") from error
    try:
        # From memory: openpyxl keeps the file of a table that is read row by row open.
        sheets = load_workbook(BytesIO(path.read_bytes()), read_only=True, data_only=True).worksheets
        tables = [_below_header(sheet.iter_rows(values_only=True)) for sheet in sheets]
        first, header, rows = next((table for table in tables if "prediction" in table[1]), tables[0])
    except (zipfile.BadZipFile, KeyError, IndexError) as error:
        raise DataError(f"{path} is no xlsx file: {error}") from error
    require_unique_columns(header, where=str(path))
    changed: dict[tuple[str, str], list[str | None]] = {}
    for number, row in enumerate(rows, start=first):
        # In files without a declared width a row ends with its last filled cell.
        cells = dict(zip_longest(header, row[: len(header)]))
        for name in ("prediction", "answer"):
            cell = cells.get(name)
            if isinstance(cell, bool) or not isinstance(cell, str | int | float | None):
                changed.setdefault((name, type(cell).__name__), []).append(_text(cell))
        yield f"row {number}", {name: _text(cell) for name, cell in cells.items()}
    notes += [
        f"{len(texts)} {name}s are cells of type {kind} in the spreadsheet, and are scored as such: {texts[0]!r}"
        for (name, kind), texts in changed.items()
    ]


def _below_header(rows: Iterator[tuple[object, ...]]) -> tuple[int, list[str], Iterator[tuple[object, ...]]]:
    """Return number of the row after the header, the header (with a cell `prediction`, else the first), the rest."""
    head = list(islice(rows, _HEADER_ROWS))
    at = next((number for number, row in enumerate(head) if "prediction" in row), 0)
    header = ["" if cell is None else str(cell) for cell in head[at]] if head else []
    return at + 2, header, chain(head[at + 1 :], rows)


def _json_rows(content: Any, invalid: SkippedSamples) -> Iterator[tuple[str, Row]]:
    """Rows of a list of records, the first being record 1, or of columns: name -> row number -> cell."""
    if isinstance(content, Mapping):
        columns = {
            name: list(cells.values() if isinstance(cells, Mapping) else cells) for name, cells in content.items()
        }
        content = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not isinstance(content, list):
        raise ValueError("expected a list of rows")
    for number, row in enumerate(content, start=1):
        if isinstance(row, Mapping):
            yield f"record {number}", {str(name): _text(cell) for name, cell in row.items()}
        else:
            invalid.add("records that are no objects", f"record {number} ({row!r:.60})")


def _text(cell: object) -> str | None:
    """Return a cell as text; whole numbers without a point, as tables show them."""
    if cell is None:
        return None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
