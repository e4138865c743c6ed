"""The resume drill in short: real processes, real kill -9; see tests/drills/resume.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["plain", "packed"])
def test_killed_runs_train_on_what_an_unbroken_run_trains_on(mode):
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills.resume", "--kills", "1", "--modes", mode],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == f"{mode}: 1 kills, 32 batches of 8 steps equal, bit for bit"
    assert second.startswith(f"{mode}: 2 -> 1 -> 4 processes, ")
    assert second.endswith("of 83 samples of the epoch, each once")
