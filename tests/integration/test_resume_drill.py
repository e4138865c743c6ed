"""The resume drill in short: real processes, real kill -9; see tests/drills/resume.py."""

import random

import pytest

from tests.drills.resume import MODES, other_ranks, same_ranks, write_sets


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
def test_killed_runs_train_on_what_an_unbroken_run_trains_on(mode, tmp_path, capsys):
    write_sets(tmp_path / "sets")
    for phase in (same_ranks, other_ranks):
        (tmp_path / phase.__name__).mkdir()
    same_ranks(tmp_path / "same_ranks", mode, 1, random.Random(0))
    other_ranks(tmp_path / "other_ranks", mode, random.Random(0))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{mode}: 1 kills, 32 batches of 8 steps equal, bit for bit"
    assert second.startswith(f"{mode}: 2 -> 1 -> 4 processes, ")
    assert second.endswith("of 83 samples of the epoch, each once")
