"""Prediction records, the JSON objects of `predictions/<dataset>.jsonl`, and the metrics' `EvalSample` made of them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.utils.skipped import SkippedSamples

from .problems import Problem, problems_by_reason
from .run import Scored

Record = dict[str, Any]
FIELDS = ("key", "question", "prediction", "references", "meta")
"""Fields of a record that are not scores."""
ERROR = "error"
"""Field of the record of a sample that could not be read: [reason, message]."""
_ALWAYS = ("key", "prediction", "references")
_NEEDED = ("key", "prediction")
_TYPES: dict[str, type] = {"key": str, "prediction": str, "references": list, "question": str, "meta": dict}
MAX_NAME = 200  # bytes of a file's name; file systems take 255
MAX_DEPTH = 50  # levels of a record's meta
_KINDS: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


def file_name(name: str) -> str:
    """Return the name of a file or folder for a key or the name of a dataset, which may have slashes or be very long.

    `urllib.parse.unquote` gives it back, where it was not too long.
    """
    quoted = quote(name, safe="", errors="surrogatepass")
    if quoted in ("", ".", ".."):  # these are folders
        quoted = quoted.replace(".", "%2E") or "%"
    if len(quoted) > MAX_NAME:
        quoted = f"{quoted[: MAX_NAME // 2]}-{hashlib.sha256(quoted.encode()).hexdigest()}"
    return quoted


def page_path(images: Path, name: str, key: str) -> Path:
    """Return the path of the page image of a sample of a dataset."""
    return images / file_name(name) / f"{file_name(key)}.png"


def readout_path(images: Path, name: str, key: str) -> Path:
    """Return the path of that page with what P_vocab reads on it."""
    return page_path(images, name, f"{key}.readout")


def to_sample(record: Record) -> EvalSample:
    """Make a metric's input of a record; a ValueError names a field that is missing or of another type."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, found {record!r:.60}")
    for name, kind in _TYPES.items():
        if not isinstance(record.get(name, None if name in _NEEDED else kind()), kind):
            raise ValueError(f"{name!r} must be {_KINDS[kind]}, found {record.get(name)!r:.60}")
    references = record.get("references", [])
    if not all(isinstance(text, str) for text in references):
        raise ValueError(f"'references' must be texts, found {references!r:.60}")
    if not _is_shallow(record.get("meta"), MAX_DEPTH):
        raise ValueError(f"'meta' is nested more than {MAX_DEPTH} levels deep")
    return EvalSample(
        key=record["key"],
        prediction=record["prediction"],
        references=tuple(references),
        question=record.get("question", ""),
        meta=dict(record.get("meta", {})),
    )


def _is_shallow(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)


def to_samples(records: Iterable[Record]) -> list[EvalSample]:
    """Make metrics' inputs of records, as `to_sample`; samples that could not be read are skipped, see `unread`."""
    return [to_sample(record) for record in records if not is_unread(record)]


def is_unread(record: Record) -> bool:
    """Return whether a record is that of a sample that could not be read, which has no prediction."""
    return bool(record.get(ERROR))


def to_records(samples: Iterable[EvalSample]) -> list[Record]:
    """Make records of metrics' inputs; the inverse of `to_samples`."""
    return [_record(one.key, one.question, one.prediction, one.references, one.meta) for one in samples]


def batch_records(
    batch: Mapping[str, Any], predictions: Sequence[str], *, read: Sequence[str] | None = None
) -> list[Record]:
    """Make the records of the predictions of a batch of a benchmark's loader, one text a sample.

    For the task `read`, which asks no question, `read` has the texts on the pages, which are the references.
    """
    keys = batch["keys"]
    if batch.get("task") != "read":
        rows = zip(keys, batch["questions"], predictions, batch["references"], batch["meta"], strict=True)
        return [_record(*row) for row in rows]
    references = [[text] for text in read] if read is not None else [[]] * len(keys)
    return [_record(key, "", text, gold) for key, text, gold in zip(keys, predictions, references, strict=True)]


def unread_records(batch: Mapping[str, Any]) -> list[Record]:
    """Make the records of the samples of a batch that could not be read: no prediction, and why."""
    return [_record(one.key) | {ERROR: [one.reason, one.message]} for one in batch["skipped"]]


def _record(
    key: str,
    question: str = "",
    prediction: str = "",
    references: Sequence[str] = (),
    meta: Mapping[str, Any] = MappingProxyType({}),
) -> Record:
    return dict(zip(FIELDS, (key, question, prediction, list(references), dict(meta)), strict=True))


def merge_records(records: Iterable[Record]) -> list[Record]:
    """Return each key once, in key order; of equal keys the last."""
    merged = {record["key"]: record for record in records}
    return [merged[key] for key in sorted(merged)]


def scored_records(records: Sequence[Record], scored: Scored) -> list[Record]:
    """Return the scored records with their scores under every rule, and the records that have an error."""
    scores = {sample.key: values for sample, values in zip(scored.samples, scored.scores, strict=True)}
    return [
        {
            **{name: record[name] for name in (*FIELDS, ERROR) if record.get(name) or name in _ALWAYS},
            **scores.get(record["key"], {}),
        }
        for record in records
        if record["key"] in scores or is_unread(record)
    ]


def unread(records: Iterable[Record]) -> list[Problem]:
    """Return a line for each reason why samples could not be read, with the first of them."""
    skipped = SkippedSamples(keep=None)
    for record in records:
        if is_unread(record):
            given = record[ERROR]
            known = isinstance(given, (list, tuple)) and len(given) == 2
            reason, message = given if known else ("unknown", given)
            skipped.add(f"samples could not be read, {reason}", f"{record.get('key')} ({message})")
    return problems_by_reason(skipped.messages)
