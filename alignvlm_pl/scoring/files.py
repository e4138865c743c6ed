"""Prediction files made elsewhere -> answers: our jsonl, and the result tables of VLMEvalKit."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import Answer
from alignvlm_pl.metrics.vlmevalkit_tables import MISSING, reload_predictions

from .faults import Faults
from .records import ERROR, Record, is_unread, to_answer, unread
from .tables import table_rows


@dataclass(kw_only=True, slots=True)
class PredictionFile:
    """What a prediction file holds.

    Attributes:
        answers: One for each usable row, in the order of the file.
        places: Key -> where in the file it stands, for example ``line 3``.
        unread: Records of the samples that could not be read when they were to be answered.
        problems: What is wrong with the others, by reason, with the first of them named.
        notes: What else a reader of the figures must know.
    """

    answers: list[Answer] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    unread: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, answer: Answer, place: str) -> None:
        """Add an answer."""
        self.answers.append(answer)
        earlier = self.places.get(answer.key)
        self.places[answer.key] = f"{earlier}, {place}" if earlier else place


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
    found, faults = PredictionFile(), Faults()
    readers[path.suffix](path, benchmark, found, faults)
    counts = Counter(answer.key for answer in found.answers)
    for key in (key for key, count in counts.items() if count > 1):
        faults.add("keys repeated, none of their rows counts", key, found.places[key])
    found.answers = [answer for answer in found.answers if counts[answer.key] == 1]
    found.problems += [*unread(found.unread), *faults.lines()]
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
    named = {record["key"] for record in found.unread}
    faults, answers, used = Faults(), [], set()
    for sample in gold:
        match = by_key.get(sample.key) or by_index.get(str(sample.meta.get("index")))
        if match is None:
            if sample.key not in named:
                faults.add("predictions missing", sample.key)
            continue
        used.add(match.key)
        answers.append(replace(sample, prediction=match.prediction))
    for answer in found.answers:
        if answer.key not in used:
            faults.add("keys that the set does not have", answer.key, found.places.get(answer.key, ""))
    return replace(found, answers=answers, problems=[*found.problems, *faults.lines()])


def _read_jsonl(path: Path, benchmark: Benchmark, found: PredictionFile, faults: Faults) -> None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                if isinstance(record, dict) and is_unread(record):
                    empty = {"prediction": "", "references": [], "meta": {}}
                    to_answer(empty | {"key": record.get("key")})
                    found.unread.append(empty | {name: record[name] for name in ("key", ERROR)})
                else:
                    found.add(to_answer(record), f"line {number}")
            except (ValueError, RecursionError) as error:
                faults.add("lines that are no prediction record", f"line {number}", str(error))


def _read_table(path: Path, benchmark: Benchmark, found: PredictionFile, faults: Faults) -> None:
    columns: dict[str, None] = {}
    for place, row in table_rows(path, faults):
        columns |= dict.fromkeys(row)
        index = row.get("index") or ""
        if not index:
            faults.add("rows without index", place)
            continue
        if "prediction" not in row:
            faults.add("rows without prediction", place)
            continue
        cells = {name: text or "" for name, text in row.items()}
        if path.suffix != ".json" and cells.get("answer") in MISSING - {""}:
            cells["answer"] = "nan"  # as pandas reads it: see `_reload`
        question, references, meta = read_row(cells, benchmark)
        answer = Answer(
            key=index,
            prediction=row["prediction"] or "",
            references=tuple(references),
            question=question,
            meta=meta,
        )
        found.add(answer, place)
    if columns and "prediction" not in columns:
        raise DataError(
            f"{path} has no column 'prediction' (found: {', '.join(columns)}): is it a result table?"
        )
    if path.suffix != ".json":
        _reload(found)


def _reload(found: PredictionFile) -> None:
    """Take the predictions as VLMEvalKit itself reads them: some do not survive its xlsx and tsv files."""
    given = [answer.prediction for answer in found.answers]
    reloaded = reload_predictions(given)
    found.answers = [
        replace(answer, prediction=text) for answer, text in zip(found.answers, reloaded, strict=True)
    ]
    if changed := sum(before != after for before, after in zip(given, reloaded, strict=True)):
        found.notes.append(
            f"{changed} predictions change in VLMEvalKit's table file, and are scored as it reads them"
        )
