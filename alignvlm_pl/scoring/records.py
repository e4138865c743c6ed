"""Prediction records: the JSON objects of `predictions/<benchmark>.jsonl`, and answers made of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignvlm_pl.metrics.base import Answer

from .run import Scored

Record = dict[str, Any]
FIELDS = ("key", "question", "prediction", "references", "meta")
"""Fields of a record that are not scores."""
_ALWAYS = ("key", "prediction", "references")


def page_path(images: Path, name: str, key: str) -> Path:
    """Return where the page image of a sample lies; keys of foreign shards may hold slashes."""
    return images / name / f"{quote(key, safe='')}.png"


def to_answers(records: Iterable[Record]) -> list[Answer]:
    """Make the answers that metrics see."""
    return [
        Answer(
            key=record["key"],
            prediction=record["prediction"],
            references=tuple(record["references"]),
            question=record.get("question", ""),
            meta=record.get("meta", {}),
        )
        for record in records
    ]


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
    """Return the records of the scored answers with their scores under every rule."""
    scores = {answer.key: values for answer, values in zip(scored.answers, scored.scores, strict=True)}
    return [
        {
            **{name: record[name] for name in FIELDS if record.get(name) or name in _ALWAYS},
            **scores[record["key"]],
        }
        for record in records
        if record["key"] in scores
    ]
