"""Loader workers and the signals of a scheduler, which reach every process of a job."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import IterableDataset

from datamodules.loading.loader import ShardLoader, WorkerItem


class Pids(IterableDataset[WorkerItem]):
    """Endless batches that name the process that made them."""

    def __iter__(self) -> Iterator[WorkerItem]:
        while True:
            time.sleep(0.01)
            yield WorkerItem(batch={"sources": [], "pid": os.getpid()})


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_outlives_everybody_s_signals_but_the_main_process_s(start_method):
    loader = ShardLoader(Pids(), num_batches=10**6, num_workers=1, start_method=start_method)
    batches = iter(loader)
    pid = next(batches)["pid"]
    assert pid != os.getpid()
    for name in ("TERM", "USR1", "INT"):  # from another process, as a scheduler's
        subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)
    # Those that were made ahead of the signals, and more.
    assert {next(batches)["pid"] for _ in range(20)} == {pid}
    worker = loader._iterator._workers[0]
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0


def test_the_main_process_ends_although_its_workers_pass_over_sigterm():
    """Where the interpreter ends, multiprocessing stops the workers by SIGTERM and waits for them."""
    program = (
        "from tests.unit.test_worker_signals import Pids, ShardLoader\n"
        "loader = ShardLoader(Pids(), num_batches=9, num_workers=2, start_method='fork')\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "raise SystemExit(85)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 85, done.stderr
    assert time.monotonic() - begun < 45


def test_starting_workers_leaves_the_main_process_s_signals_as_they_were():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    next(iter(ShardLoader(Pids(), num_batches=1, num_workers=1, start_method="fork")))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
