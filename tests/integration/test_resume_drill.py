"""The resume drill in short: real processes, real kill -9; see tests/drills/resume.py.

A phase with one mode each; `make drills` runs all four, and tests/unit/test_resume.py takes streams up in one process.
"""

import random

import pytest

from tests.drills.resume import other_ranks, same_ranks, write_sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_run_trains_on_what_an_unbroken_run_trains_on(tmp_path, capsys):
    write_sets(tmp_path / "sets")
    (tmp_path / "run").mkdir()
    same_ranks(tmp_path / "run", "packed", 1, random.Random(0))
    assert capsys.readouterr().out == "packed: 1 kills, 32 batches of 8 steps equal, bit for bit\n"


def test_a_run_killed_between_other_numbers_of_ranks_sees_each_sample_once(tmp_path, capsys):
    write_sets(tmp_path / "sets")
    (tmp_path / "run").mkdir()
    other_ranks(tmp_path / "run", "plain", random.Random(0))
    assert capsys.readouterr().out == "plain: 2 -> 1 -> 4 processes, 80 of 83 samples of the epoch, each once\n"
