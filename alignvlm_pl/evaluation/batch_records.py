"""Prediction records of a batch (no torch here)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..scoring.records import ERROR, Record


def batch_records(batch: Mapping[str, Any], predictions: Sequence[str]) -> list[Record]:
    """Prediction records of one generation batch: key, question, prediction, references and what metrics need.

    Raises:
        ValueError: There is not one prediction for each sample.
    """
    rows = zip(
        batch["keys"], batch["questions"], predictions, batch["references"], batch["meta"], strict=True
    )
    return [
        {
            "key": key,
            "question": question,
            "prediction": prediction,
            "references": list(references),
            "meta": meta,
        }
        for key, question, prediction, references, meta in rows
    ]


def bad_records(batch: Mapping[str, Any]) -> list[Record]:
    """Records of the samples that could not be read: no answer, and why (CONTRACT:
    datamodules/loading/eval_batches.py).
    """
    return [
        {
            "key": bad.key,
            "question": "",
            "prediction": "",
            "references": [],
            "meta": {},
            ERROR: [bad.reason, bad.message],
        }
        for bad in batch["bad"]
    ]


def readout_records(batch: Mapping[str, Any], readings: Sequence[tuple[str, str]]) -> list[Record]:
    """Records of one batch read from P_vocab: the reading, and the text that stands there as the reference."""
    return [
        {"key": key, "question": "", "prediction": found, "references": [truth], "meta": {}}
        for key, (found, truth) in zip(batch["keys"], readings, strict=True)
    ]
