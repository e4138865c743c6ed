"""Windows -> batches: as they come, of like length, packed; each sample once, the same for whoever asks."""

import random

import pytest

from datamodules.stream.batching import BatchPlanner, fill_rows


def never(positions):
    raise AssertionError("lengths are not needed")


def flat(batches):
    return sorted(position for batch in batches for row in batch for position in row)


def test_batches_as_they_come_ask_for_no_length():
    planner = BatchPlanner(batch_size=3)
    assert planner.plan(2, never) == [[[6], [7], [8]]]


def test_a_length_window_sorts_and_shuffles_batches():
    lengths = random.Random(1).sample(range(1000), 24)
    planner = BatchPlanner(batch_size=4, length_window=6, seed="s")
    batches = planner.plan(0, lambda positions: [lengths[p] for p in positions])
    assert flat(batches) == list(range(24))
    spans = [sorted(lengths[row[0]] for row in batch) for batch in batches]
    assert [span[0] for span in spans] != sorted(span[0] for span in spans)
    assert sorted(value for span in spans for value in span) == [v for span in sorted(spans) for v in span]


@pytest.mark.parametrize("seed", range(10))
def test_packing_keeps_budget_and_samples(seed):
    rng = random.Random(seed)
    lengths = [rng.choice([729 + rng.randint(5, 80), 7290 + rng.randint(5, 400)]) for _ in range(256)]
    rows = fill_rows(range(256), lengths, 16384)
    assert sorted(position for row in rows for position in row) == list(range(256))
    assert all(row == sorted(row) for row in rows)
    filled = [sum(lengths[p] for p in row) for row in rows]
    assert max(filled) <= 16384
    assert sum(filled) / (16384 * len(rows)) > 0.95


def test_what_cannot_be_measured_or_is_too_long_stays_in_the_plan():
    rows = fill_rows([10, 11, 12], [0, 50, 9], 10)
    assert sorted(map(tuple, rows)) == [(10, 11), (12,)]


def test_rows_become_batches_and_the_last_may_be_short():
    planner = BatchPlanner(batch_size=2, token_budget=10, pack_window=5)
    batches = planner.plan(1, lambda positions: [6] * len(positions))
    assert flat(batches) == [5, 6, 7, 8, 9]
    assert sorted(map(len, batches)) == [1, 2, 2]
    assert batches == planner.plan(1, lambda positions: [6] * len(positions))
