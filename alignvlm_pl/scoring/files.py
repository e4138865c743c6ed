"""Prediction files made elsewhere -> answers: our jsonl, and the result tables of VLMEvalKit."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics import reload_predictions
from alignvlm_pl.metrics.base import Answer
from alignvlm_pl.metrics.vlmevalkit_tables import MISSING

from .faults import Faults
from .records import to_answer
from .tables import table_rows


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
    found, faults = PredictionFile(), Faults()
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
    faults, answers, used = Faults(), [], set()
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


def _read_jsonl(path: Path, benchmark: Benchmark, found: PredictionFile, faults: Faults) -> None:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                found.answers.append(to_answer(json.loads(line.decode("utf-8-sig"))))
            except ValueError as error:
                faults.add("lines that are no prediction record", f"line {number}", str(error))


def _read_table(path: Path, benchmark: Benchmark, found: PredictionFile, faults: Faults) -> None:
    for number, row in table_rows(path, faults):
        if "prediction" not in row:
            raise DataError(
                f"{path} has no column 'prediction' (found: {', '.join(row)}): is it a result table?"
            )
        index = row.get("index") or ""
        if not index:
            faults.add("rows without index", f"row {number}")
            continue
        cells = {name: text or "" for name, text in row.items()}
        if path.suffix != ".json" and cells.get("answer") in MISSING - {""}:
            cells["answer"] = "nan"  # as pandas reads it: see `_reload`
        question, references, meta = read_row(cells, benchmark)
        found.answers.append(
            Answer(
                key=index,
                prediction=row["prediction"] or "",
                references=tuple(references),
                question=question,
                meta=meta,
            )
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
