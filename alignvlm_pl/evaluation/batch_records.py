"""Prediction records of a batch (no torch here)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..scoring.records import ERROR, Record

if TYPE_CHECKING:
    from ..preprocessing.batch import Batch


def batch_records(batch: "Batch", predictions: Sequence[str], *, read: Sequence[str] | None = None) -> list[Record]:
    """Make the records of a batch: key, question, prediction, references and what metrics need.

    Args:
        batch: A batch of a benchmark's loader.
        predictions: One string a sample.
        read: The true texts, where the batch was read and no question asked; they are the references.

    Raises:
        ValueError: There is not one prediction for each sample.
    """
    count = len(batch["keys"])
    described: Iterable[tuple[str, Sequence[str], Mapping[str, Any]]]
    if batch.get("task") == "read":
        references = [[text] for text in read] if read is not None else [[]] * count
        described = zip([""] * count, references, [{}] * count, strict=True)
    else:
        described = zip(batch["questions"], batch["references"], batch["meta"], strict=True)
    rows = zip(batch["keys"], predictions, described, strict=True)
    return [
        {
            "key": key,
            "question": question,
            "prediction": prediction,
            "references": list(accepted),
            "meta": dict(extra),
        }
        for key, prediction, (question, accepted, extra) in rows
    ]


def bad_records(batch: "Batch") -> list[Record]:
    """Make the records of the samples that could not be read: no prediction, and why (CONTRACT:
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
