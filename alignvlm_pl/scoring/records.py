"""Prediction records: the JSON objects of `predictions/<benchmark>.jsonl`, and answers made of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignvlm_pl.metrics.base import Answer

from .faults import Faults
from .run import Scored

Record = dict[str, Any]
FIELDS = ("key", "question", "prediction", "references", "meta")
"""Fields of a record that are not scores."""
ERROR = "error"
"""Field of the record of a sample that could not be read: [reason, message]."""
_ALWAYS = ("key", "prediction", "references")
_NEEDED = ("key", "prediction")
_TYPES: dict[str, type] = {"key": str, "prediction": str, "references": list, "question": str, "meta": dict}
_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def page_path(images: Path, name: str, key: str) -> Path:
    """Return where the page image of a sample lies; keys of foreign shards may hold slashes."""
    return images / name / f"{quote(key, safe='')}.png"


def to_answer(record: Record) -> Answer:
    """Make an answer of a record.

    Raises:
        ValueError: A field is missing or of another type; the message names it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, found {record!r:.60}")
    for name, kind in _TYPES.items():
        if not isinstance(record.get(name, None if name in _NEEDED else kind()), kind):
            raise ValueError(f"{name!r} must be {_KINDS[kind]}, found {record.get(name)!r:.60}")
    references = record.get("references", [])
    if not all(isinstance(text, str) for text in references):
        raise ValueError(f"'references' must be texts, found {references!r:.60}")
    return Answer(
        key=record["key"],
        prediction=record["prediction"],
        references=tuple(references),
        question=record.get("question", ""),
        meta=dict(record.get("meta", {})),
    )


def to_answers(records: Iterable[Record]) -> list[Answer]:
    """Make answers of records; ValueError as `to_answer`."""
    return [to_answer(record) for record in records]


def to_records(answers: Iterable[Answer]) -> list[Record]:
    """Make records of answers; the inverse of `to_answers`."""
    return [
        {
            "key": answer.key,
            "question": answer.question,
            "prediction": answer.prediction,
            "references": list(answer.references),
            "meta": dict(answer.meta),
        }
        for answer in answers
    ]


def merge_records(records: Iterable[Record]) -> list[Record]:
    """Return each key once, in key order; of equal keys the last."""
    merged = {record["key"]: record for record in records}
    return [merged[key] for key in sorted(merged)]


def scored_records(records: Sequence[Record], scored: Scored) -> list[Record]:
    """Return the records of the scored answers with their scores under every rule, and those that have an error."""
    scores = {answer.key: values for answer, values in zip(scored.answers, scored.scores, strict=True)}
    return [
        {
            **{name: record[name] for name in (*FIELDS, ERROR) if record.get(name) or name in _ALWAYS},
            **scores.get(record["key"], {}),
        }
        for record in records
        if record["key"] in scores or ERROR in record
    ]


def unread(records: Iterable[Record]) -> list[str]:
    """Return a line for each reason why samples could not be read, with the first of them."""
    faults = Faults()
    for record in records:
        if ERROR in record:
            reason, message = record[ERROR]
            faults.add(f"samples could not be read, {reason}", record["key"], message)
    return faults.lines()
