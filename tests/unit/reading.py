"""Reading a source to its end, and commands of `prepare`."""

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datamodules import prepare
from datamodules.prepare.sources.source import SourceSample, or_error
from datamodules.shards.sample import SampleError, check_record, message_text


def read(raw: Any) -> tuple[list[SourceSample], Counter[str]]:
    """Samples and counts of invalid rows, as another process converts them: the source and its rows are pickled."""
    samples, invalid = [], Counter()
    assert " at 0x" not in repr(raw)  # what a resumed run compares: no address of an object in it
    other, rows = pickle.loads(pickle.dumps((raw, [row for part in raw.parts() for row in raw.rows(part)])))
    assert raw.num_rows() in (None, len(rows))
    for row in rows:
        item = row if isinstance(row, SampleError) else or_error(other.sample, row)
        if isinstance(item, SampleError):
            invalid[item.reason] += 1
        elif item is not None:
            check_record(item.record, num_images=len(item.images), where="test")
            samples.append(item)
    return samples, invalid


def texts(sample: SourceSample) -> list[str]:
    return [message_text(turn) for turn in sample.record["messages"]]


def command(kind: str) -> Callable[[Sequence[str]], int]:
    """Return the command of a kind of `prepare`."""

    def run(argv: Sequence[str]) -> int:
        return prepare.main([kind, *argv])

    run.__module__ = kind
    return run
