"""The references of a dataset, read from its shards without images."""

from pathlib import Path

from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import EvalSample

from .manifest import load_manifest
from .reader import is_json, read_range
from .sample import last_question, references
from .sample_formats import parse_record


def read_answers(folder: Path | str) -> list[EvalSample]:
    """Read the samples of a dataset in the sample schema, with empty predictions; DataError where it is not in it."""
    manifest = load_manifest(folder)
    answers = []
    for raw in read_range(manifest, wanted=is_json):
        name = f"{raw['__key__']}.json"
        try:
            answers.append(_answer(raw["__key__"], parse_record(raw.get("json", b""), where=name)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{raw['__url__']}: {name} is not in the sample schema ({error})") from error
    return answers


def _answer(key: str, record: dict) -> EvalSample:
    given, meta = record.get("references", []), record.get("meta") or {}
    if not isinstance(given, list) or not isinstance(meta, dict):
        raise TypeError(f"references must be a list and meta an object, found {given!r:.60}, {meta!r:.60}")
    gold, question = tuple(references(record)), last_question(record["messages"])
    return EvalSample(key=key, prediction="", references=gold, question=question, meta=meta)
