"""A loader that hangs prints the stacks of its own process and of its workers, and goes on when the batch comes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGING = """
import logging, sys, time
from torch.utils.data import IterableDataset
from datamodules.loading.loader import ShardLoader, WorkerItem


class Slow(IterableDataset):
    def __iter__(self):
        return self.wait_for_the_disk()

    def wait_for_the_disk(self):
        time.sleep(1.5)
        yield WorkerItem(batch={"sources": ["a"]})


if __name__ == "__main__":  # workers import this file
    logging.basicConfig(stream=sys.stderr)
    seconds = float(sys.argv[2]) or None
    loader = ShardLoader(Slow(), num_batches=1, num_workers=int(sys.argv[1]), stall_seconds=seconds)
    print([batch["sources"] for batch in loader], loader.wait_seconds > 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "seconds"), [(0, 0.5), (1, 0.5), (1, 0.0)])
def test_a_hanging_loader_prints_all_stacks(tmp_path, num_workers, seconds):
    script = tmp_path / "hang.py"
    script.write_text(HANGING)
    done = subprocess.run(
        [sys.executable, str(script), str(num_workers), str(seconds)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "[['a']] True\n", done.stderr
    assert ("no batch for" in done.stderr) is bool(seconds)
    # By name: the function that waits, wherever it runs.
    assert ("in wait_for_the_disk" in done.stderr) is bool(seconds)
    if seconds and num_workers:
        assert "the stacks of this process and of its 1 workers" in done.stderr
        assert "in _batches" in done.stderr
