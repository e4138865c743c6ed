"""Reading a source to its end, and commands of `prepare`."""

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datamodules import prepare
from datamodules.prepare.sources.source import SourceSample
from datamodules.shards.sample import SampleError, check_record, message_text


def read(raw: Any, *, counted: bool = True) -> tuple[list[SourceSample], Counter[str]]:
    """Samples and counts of invalid rows, as another process would read them: the source and its parts are pickled.

    Parts say how many rows they have, unless they are not `counted`.
    """
    samples, invalid = [], Counter()
    for part in pickle.loads(pickle.dumps(list(raw.parts()))):
        # What a resumed run compares: no address of an object in it.
        assert " at 0x" not in repr(part.payload)
        found = list(pickle.loads(pickle.dumps(raw)).read(part))
        assert part.rows == len(found) or (part.rows is None and not counted)
        for item in found:
            if isinstance(item, SampleError):
                invalid[item.reason] += 1
            else:
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
