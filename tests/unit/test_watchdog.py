"""A loader that hangs prints the stacks of its own process and of its workers, and ends with an error in the end."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import IterableDataset

from alignvlm_pl.errors import DataError
from datamodules.loading import loader
from datamodules.loading.loader import WorkerItem
from tests.drills.launch import Finished, end_program

HANGING = """
import logging, os, sys, time
from torch.utils.data import IterableDataset
from datamodules.loading.loader import ShardLoader, WorkerItem


class Slow(IterableDataset):
    def __iter__(self):
        return self.wait_for_the_disk()

    def wait_for_the_disk(self):
        time.sleep(float(os.environ['HANG']))
        yield WorkerItem(batch={"sources": ["a"]})


if __name__ == "__main__":  # workers import this file
    logging.basicConfig(stream=sys.stderr)
    seconds = float(sys.argv[2]) or None
    loader = ShardLoader(Slow(), num_batches=1, num_workers=int(sys.argv[1]), stall_seconds=seconds)
    print([batch["sources"] for batch in loader], loader.wait_seconds > 1)
"""


def hang(tmp_path: Path, num_workers: int, stall_seconds: float, seconds: float) -> Finished:
    """Load from a disk that hangs for some seconds."""
    script = tmp_path / "hang.py"
    script.write_text(HANGING)
    return end_program(script, num_workers, stall_seconds, environment={"HANG": str(seconds)}, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "seconds"), [(0, 0.5), (1, 1.0), (1, 0.0)])
def test_a_hanging_loader_prints_all_stacks(tmp_path, num_workers, seconds):
    done = hang(tmp_path, num_workers, seconds, 1.5)
    # Not the end of the output: stacks may still be written when the batch comes.
    assert "[['a']] True\n" in done.output, done.output
    said = "no batch for" if num_workers else "Timeout (0:00:00.5"
    assert (said in done.output) is bool(seconds)
    # By name: the function that waits, wherever it runs.
    assert ("in wait_for_the_disk" in done.output) is bool(seconds)
    if seconds and num_workers:
        assert "the stacks of this process and of its 1 workers" in done.output
        assert "in _batches" in done.output


@pytest.mark.slow
def test_workers_that_hang_for_three_periods_are_killed_and_the_error_names_the_setting(tmp_path):
    done = hang(tmp_path, 1, 0.5, 50)
    assert done.returncode == 1
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("alignvlm_pl.errors.DataError: the data workers gave no batch for ")
    assert "raise data.init_args.stall_seconds (0: wait for ever)" in last
    assert "in wait_for_the_disk" in done.output


class Late:
    """The iterator of a loader whose batch comes while its workers print their stacks for the third time."""

    def __init__(self, waits: int) -> None:
        self.waits = waits

    def __next__(self) -> WorkerItem:
        time.sleep(0.02)
        self.waits -= 1
        if self.waits >= 0:
            raise RuntimeError("DataLoader timed out after 0.02 seconds")
        return WorkerItem(batch={"sources": ["a"]})


@pytest.mark.parametrize("comes", [True, False])
def test_workers_whose_batch_comes_while_they_print_continue(monkeypatch, comes):
    printed: list[float] = []
    monkeypatch.setattr(loader, "print_stacks", lambda waited, workers: printed.append(waited))
    monkeypatch.setattr(loader, "kill_workers", lambda workers: None)
    monkeypatch.setattr(loader, "_PRINTING_S", 0.0)
    one = loader.ShardLoader(Empty(), num_batches=1, num_workers=0, stall_seconds=0.02)
    one._iterator = Late(3 if comes else 9)
    one.workers = [SimpleNamespace(exitcode=None)]  # type: ignore[list-item]
    if comes:
        assert one._next().batch == {"sources": ["a"]}
    else:
        with pytest.raises(DataError, match="gave no batch for 0 s and were killed"):
            one._next()
    assert len(printed) == 3


class Empty(IterableDataset[WorkerItem]):
    def __iter__(self) -> Iterator[WorkerItem]:
        return iter(())
