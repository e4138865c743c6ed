"""Files of the ledger: what a resume cuts off, and what a step is read from."""

import json

import pytest

from alignvlm_pl.errors import DataError
from callbacks.ledger import with_losses
from callbacks.ledger_file import cut, rank_file, read_step, short, to_line

HEAD = {"ledger": 1, "after": 0, "rank": 0, "world": 1}


def step_line(step, micro=0, rank=0):
    return {"step": step, "micro": micro, "rank": rank, "keys": [f"k{step}{micro}{rank}"]}


def write(path, *records, tail=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(map(to_line, records)) + tail)
    return path


def left(path):
    return [(line.get("step"), line.get("after")) for line in map(json.loads, path.read_text().splitlines())]


@pytest.mark.parametrize(
    ("after", "kept"),
    [(0, []), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, "h2", 3]), (9, [0, 1, 2, "h2", 3, 4])],
)
def test_a_resume_cuts_what_was_written_behind_its_step(tmp_path, after, kept):
    records = [HEAD, step_line(1), step_line(2), {**HEAD, "after": 2}, step_line(3), step_line(4)]
    path = write(tmp_path / "a.jsonl", *records, tail='{"step":5,"mic')
    names = {0: (None, 0), "h2": (None, 2)}
    expected = [names.get(name, (name, None)) for name in kept]
    cut(path, after)
    assert left(path) == expected
    cut(path, after)
    assert left(path) == expected


def test_a_step_has_the_micro_batches_of_all_ranks_in_order(tmp_path):
    head = {**HEAD, "world": 2}
    for rank in (1, 0):
        lines = [step_line(1, 0, rank), step_line(12, 0, rank), step_line(2, 1, rank), step_line(2, 0, rank)]
        write(rank_file(tmp_path, rank), {**head, "rank": rank}, *lines)
    found = read_step(tmp_path, 2)
    assert [(entry.line["rank"], entry.line["micro"]) for entry in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [entry.head["rank"] for entry in found] == [0, 0, 1, 1]


def test_a_line_belongs_to_the_head_before_it(tmp_path):
    write(rank_file(tmp_path, 0), {**HEAD, "world": 2}, step_line(1), {**HEAD, "after": 1}, step_line(2))
    write(rank_file(tmp_path, 1), {**HEAD, "world": 2, "rank": 1}, step_line(1, 0, 1))
    assert [entry.head["world"] for entry in read_step(tmp_path, 1)] == [2, 2]
    assert [entry.head["world"] for entry in read_step(tmp_path, 2)] == [1]


def test_missing_steps_and_ranks_are_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no ledger in .*training has not begun there"):
        read_step(tmp_path, 1)
    write(rank_file(tmp_path, 0), {**HEAD, "world": 2}, *(step_line(n) for n in (3, 4)), step_line(4, 1))
    with pytest.raises(DataError, match="there is no step 7; it has steps 3 to 4"):
        read_step(tmp_path, 7)
    with pytest.raises(DataError, match=r"step 4 is not whole, ranks \[1\] have fewer than 2 micro batches"):
        read_step(tmp_path, 4)
    write(rank_file(tmp_path, 0), {**HEAD, "ledger": 2}, step_line(4))
    with pytest.raises(DataError, match="expected version 1, found"):
        read_step(tmp_path, 4)


def test_losses_are_means_of_a_token_by_document_and_source():
    line = {"step": 1, "keys": ["a", "b", "c"], "of": ["x", "y", "x"]}
    found = with_losses(line, [9.0, 2.0, 1.0, 6.0, 4.0, 0.0, 2.0])
    assert found["supervised"] == [4, 0, 2]
    assert found["losses"] == [0.5, 1.0, 3.0]
    assert found["loss"] == 1.5
    assert found["sources"] == {"x": [round(8 / 6, 8), 6], "y": [1.0, 0]}
    assert "of" not in found


def test_nine_digits_tell_floats_apart():
    import numpy as np

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert [np.float32(short(float(value))) for value in values] == list(values)
