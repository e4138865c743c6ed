"""Prediction files made elsewhere -> answers: our jsonl, and the result tables of VLMEvalKit."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.metrics import reload_predictions
from alignvlm_pl.metrics.base import Answer

MAX_NAMED = 5
_MAX_FIELD = 2**31 - 1


@dataclass(kw_only=True, slots=True)
class PredictionFile:
    """What a prediction file holds.

    Attributes:
        answers: One for each usable row, in the order of the file.
        problems: What is wrong with the others, by reason, with the first of them named.
        notes: What else a reader of the figures must know.
    """

    answers: list[Answer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_predictions(path: Path, benchmark: Benchmark) -> PredictionFile:
    """Read a prediction file.

    Args:
        path: ``.jsonl`` of ours, or ``.xlsx``, ``.json`` or ``.tsv`` as VLMEvalKit writes its results.
        benchmark: Whose predictions they are.

    Raises:
        DataError: The file is missing, of another kind, or holds no prediction.
    """
    readers = {".jsonl": _read_jsonl, ".xlsx": _read_table, ".json": _read_table, ".tsv": _read_table}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: expected a {', '.join(readers)} file of predictions, found {path.suffix or 'no ending'}"
        )
    if not path.is_file():
        raise DataError(f"there is no prediction file {path}")
    found, faults = PredictionFile(), _Faults()
    readers[path.suffix](path, benchmark, found, faults)
    counts = Counter(answer.key for answer in found.answers)
    for key in (key for key, count in counts.items() if count > 1):
        faults.add("keys repeated, none of their rows counts", key)
    found.answers = [answer for answer in found.answers if counts[answer.key] == 1]
    found.problems += faults.lines()
    if not found.answers:
        raise DataError(
            f"{path} holds no usable prediction{': ' if found.problems else ''}{'; '.join(found.problems)}"
        )
    return found


def join_gold(found: PredictionFile, gold: Sequence[Answer]) -> PredictionFile:
    """Take question, references and meta from the set that was answered, and name what does not fit.

    Args:
        found: The predictions.
        gold: The samples of the set, their predictions empty.

    Returns:
        Answers in the order of the set; unknown keys and missing ones are problems.
    """
    by_key = {answer.key: answer for answer in found.answers}
    # Tables made elsewhere know the row's index, not our keys.
    by_index = {str(answer.meta.get("index")): answer for answer in found.answers if "index" in answer.meta}
    faults, answers, used = _Faults(), [], set()
    for sample in gold:
        match = by_key.get(sample.key) or by_index.get(str(sample.meta.get("index")))
        if match is None:
            faults.add("predictions missing", sample.key)
            continue
        used.add(match.key)
        answers.append(replace(sample, prediction=match.prediction))
    for key in by_key.keys() - used:
        faults.add("keys that the set does not have", key)
    return PredictionFile(answers=answers, problems=[*found.problems, *faults.lines()], notes=found.notes)


def _read_jsonl(path: Path, benchmark: Benchmark, found: PredictionFile, faults: "_Faults") -> None:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
                found.answers.append(_answer(record))
            except (ValueError, KeyError, TypeError, AttributeError):
                faults.add("lines without key and prediction", f"line {number}")


def _answer(record: Mapping[str, Any]) -> Answer:
    references = record.get("references", [])
    texts = (record["key"], record["prediction"], *references)
    if not all(isinstance(text, str) for text in texts) or not isinstance(references, list):
        raise TypeError("key, prediction and references are text")
    return Answer(
        key=record["key"],
        prediction=record["prediction"],
        references=tuple(references),
        question=record.get("question", ""),
        meta=dict(record.get("meta", {})),
    )


def _read_table(path: Path, benchmark: Benchmark, found: PredictionFile, faults: "_Faults") -> None:
    """Read a result table as VLMEvalKit itself would: some predictions do not survive its file."""
    for number, row in enumerate(_rows(path), start=2):
        if row.get("prediction") is None and "prediction" not in row:
            raise DataError(
                f"{path} has no column 'prediction' (found: {', '.join(row)}): is it a result table?"
            )
        index = row.get("index") or ""
        if not index:
            faults.add("rows without index", f"row {number}")
            continue
        question, references, meta = read_row({name: text or "" for name, text in row.items()}, benchmark)
        if not references:
            faults.add("rows without an accepted answer", f"row {number}")
            continue
        found.answers.append(
            Answer(
                key=index,
                prediction=row["prediction"] or "",
                references=tuple(references),
                question=question,
                meta=meta,
            )
        )
    given = [answer.prediction for answer in found.answers]
    reloaded = reload_predictions(given)
    found.answers = [
        replace(answer, prediction=text) for answer, text in zip(found.answers, reloaded, strict=True)
    ]
    if changed := sum(before != after for before, after in zip(given, reloaded, strict=True)):
        found.notes.append(
            f"{changed} predictions change in VLMEvalKit's table file, and are scored as it reads them"
        )


def _rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a table as texts; empty cells are None."""
    try:
        if path.suffix == ".xlsx":
            yield from _xlsx_rows(path)
        elif path.suffix == ".tsv":
            csv.field_size_limit(_MAX_FIELD)
            with path.open(encoding="utf-8", newline="") as stream:
                yield from csv.DictReader(stream, delimiter="\t")
        else:
            yield from _json_rows(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, OSError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} does not read as a table: {error}") from error


def _xlsx_rows(path: Path) -> Iterator[dict[str, str | None]]:
    import zipfile

    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ConfigError(
            f"{path}: xlsx files need openpyxl: pip install 'alignvlm_pl[benchmarks]'"
        ) from error
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no xlsx file: {error}") from error
    rows = sheet.iter_rows(values_only=True)
    header = [str(cell) for cell in next(rows, ())]
    for row in rows:
        yield {name: _text(cell) for name, cell in zip(header, row, strict=False)}


def _json_rows(content: Any) -> Iterator[dict[str, str | None]]:
    """Rows of a list of records, or of columns: name -> row number -> cell."""
    if isinstance(content, Mapping):
        columns = {
            name: list(cells.values() if isinstance(cells, Mapping) else cells)
            for name, cells in content.items()
        }
        content = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not isinstance(content, list) or not all(isinstance(row, Mapping) for row in content):
        raise ValueError("expected a list of rows")
    for row in content:
        yield {str(name): _text(cell) for name, cell in row.items()}


def _text(cell: object) -> str | None:
    """Return a cell as text; whole numbers without a point, as tables show them."""
    if cell is None:
        return None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


class _Faults:
    """Counts what is wrong by reason, and names the first of each."""

    def __init__(self) -> None:
        self._named: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._named.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        return [
            f"{len(names)} {reason}: {', '.join(names[:MAX_NAMED])}{', …' if len(names) > MAX_NAMED else ''}"
            for reason, names in self._named.items()
        ]
