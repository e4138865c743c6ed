"""Cursors: whatever the number of ranks becomes, and wherever they stop, nothing is lost and nothing comes twice."""

import random
from collections import Counter

import pytest

from datamodules.stream.state import Cursor, first_cursors, redistribute, unfinished_windows


def take(cursor: Cursor, count: int, batches: dict[int, int]) -> tuple[list[tuple[int, int]], Cursor]:
    """Take batches from a cursor as a worker does; windows have as many as `batches` says."""
    found: list[tuple[int, int]] = []
    for window, done, after in cursor.windows():
        for index in range(done, batches[window]):
            if len(found) == count:
                return found, after.within(window, index)
            found.append((window, index))
        if len(found) == count:
            return found, after
    raise AssertionError("windows never end")


@pytest.mark.parametrize("seed", range(20))
def test_any_history_of_ranks_reads_each_batch_once(seed):
    rng = random.Random(seed)
    batches = {window: rng.choice([1, 1, 2, 5]) for window in range(10_000)}
    cursors, seen = first_cursors(rng.randint(1, 4)), Counter()
    for _ in range(rng.randint(1, 6)):
        count = rng.randint(0, 30)
        taken = [take(cursor, count, batches) for cursor in cursors]
        seen.update(batch for found, _ in taken for batch in found)
        states = [cursor.state_dict() for _, cursor in taken]
        cursors = redistribute([Cursor.from_state_dict(state) for state in states], rng.randint(1, 5))
    left, begun = unfinished_windows(cursors)
    assert set(seen.values()) <= {1}
    done = dict(left)
    expected = {(window, index) for window in range(begun) for index in range(done.get(window, batches[window]))}
    assert set(seen) == expected


def test_the_same_number_of_ranks_keeps_its_batches():
    cursors = [Cursor(pending=((4, 1),), next=6, stride=2), Cursor(next=9, stride=2)]
    assert redistribute(cursors, 2) == cursors
    # Windows 6 and 8 of rank 0 lie before the 9th, which rank 1 has reached.
    assert unfinished_windows(cursors) == ([(4, 1), (6, 0), (8, 0)], 9)
    assert redistribute(cursors, 1) == [Cursor(pending=((4, 1), (6, 0), (8, 0)), next=9, stride=1)]
