"""The journal of an evaluation: what survives, what is thrown away."""

import json
import os

from alignvlm_pl.scoring.journal import Journal, weights_identity

RECORDS = [{"key": f"k{n}", "prediction": f"ä{n}"} for n in range(3)]


def write(folder, identity, rank=0, positions=(0, 1, 2)):
    journal = Journal(folder, identity)
    journal.open(rank)
    for position in positions:
        journal.append([position], [RECORDS[position]])
    journal.close()
    return journal


def test_predictions_of_all_ranks_come_back(tmp_path):
    write(tmp_path, {"weights": ("a", 1)}, rank=0, positions=(0,))
    write(tmp_path, {"weights": ("a", 1)}, rank=1, positions=(2,))
    assert Journal(tmp_path, {"weights": ["a", 1]}).read() == {0: RECORDS[0], 2: RECORDS[2]}


def test_half_a_line_is_left_out_and_overwritten(tmp_path):
    write(tmp_path, {}, positions=(0, 1))
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert set(Journal(tmp_path, {}).read()) == {0}
    again = Journal(tmp_path, {})
    again.open(0)
    again.append([2], [RECORDS[2]])
    again.close()
    assert set(Journal(tmp_path, {}).read()) == {0, 2}
    assert next(json.loads(line) for line in path.read_text().splitlines()) == {}


def test_predictions_of_another_evaluation_are_discarded(tmp_path):
    write(tmp_path, {"weights": "old"})
    journal = Journal(tmp_path, {"weights": "new"})
    assert journal.read() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_removed_journal_is_empty(tmp_path):
    journal = write(tmp_path / "set", {})
    journal.remove()
    assert Journal(tmp_path / "set", {}).read() == {}


def test_weights_written_again_are_other_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"1")
    first = weights_identity(tmp_path)
    assert first == weights_identity(tmp_path)
    os.utime(path, ns=(1, 1))
    assert weights_identity(tmp_path) != first
    assert weights_identity("hub/name") == "hub/name"
    assert weights_identity(None) is None
