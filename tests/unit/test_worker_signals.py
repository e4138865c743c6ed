"""Worker processes: signals of a scheduler, which reach every process of a job, and workers that die or hang."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from torch.utils.data import IterableDataset

from alignvlm_pl.errors import DataError
from datamodules.loading.loader import ShardLoader, WorkerItem, worker_and_count
from tests.drills.launch import ROOT, Finished, end_program

LOCK = threading.Lock()
PROGRAM = """
import os, sys
from tests.unit.test_worker_signals import started

if __name__ == "__main__":  # workers import this file
    if sys.argv[1] == "forked" and os.fork():
        raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
    loader, batches = started(2)
    next(batches)
    raise SystemExit(85)
"""


class Pids(IterableDataset[WorkerItem]):
    """Endless batches that name the process that made them, and its parent."""

    def __iter__(self) -> Iterator[WorkerItem]:
        while True:
            time.sleep(0.01)
            yield WorkerItem(batch={"sources": [], "pid": os.getpid(), "parent": os.getppid()})


class Locked(IterableDataset[WorkerItem]):
    """One batch: whether a lock of this module can be had."""

    def __iter__(self) -> Iterator[WorkerItem]:
        yield WorkerItem(batch={"sources": [], "free": LOCK.acquire(timeout=1)})


def started(num_workers: int = 1, **options: float) -> tuple[ShardLoader, Iterator[dict]]:
    loader = ShardLoader(Pids(), num_batches=10**6, num_workers=num_workers, **options)
    return loader, iter(loader)


@pytest.mark.slow
def test_workers_and_their_server_outlive_the_signals_of_a_scheduler():
    loader, batches = started()
    first = next(batches)
    pid, server = first["pid"], first["parent"]
    assert os.getpid() not in (pid, server)
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {pid} {server}"], check=True)
    # Those that were made before the signals, and more.
    assert {next(batches)["pid"] for _ in range(20)} == {pid}
    loader.close()
    assert not loader.workers
    another, batches = started()
    assert next(batches)["parent"] == server
    another.close()


@pytest.mark.slow
@pytest.mark.parametrize("begin", ["started", "forked"])
def test_the_main_process_ends_although_its_workers_ignore_sigterm(begin, tmp_path):
    """When the interpreter ends, multiprocessing sends workers SIGTERM and waits for them without a limit.

    The main process may be a fork, as a rank of the strategy `ddp_notebook` is.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    if begin == "started":
        found = end_program(program, begin, timeout=120)
    else:  # of a new interpreter: a program of the server has a server of workers already, which a fork cannot use
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, program, begin]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120)
        found = Finished(done.returncode, done.stderr)
    assert found == (85, "")


def test_starting_workers_leaves_the_main_process_s_signals_as_they_were():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader, batches = started()
    next(batches)
    loader.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_lock_that_a_thread_holds_while_workers_start_is_free_in_them():
    """A forked worker would wait for it for ever."""
    with LOCK:
        (batch,) = ShardLoader(Locked(), num_batches=1, num_workers=1)
    assert batch["free"]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_its_pid():
    loader, batches = started()
    pid = next(batches)["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"a data worker died \(pid {pid}, exit code -9\)"):
        for _ in batches:
            pass
    loader.close()


def continue_once_reported(pid: int, caplog: pytest.LogCaptureFixture) -> None:
    """Let a stopped worker continue once it is reported, or after 60 s."""
    end = time.monotonic() + 60
    while "follow" not in caplog.text and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_reported_and_killed_when_the_loader_closes(caplog):
    loader, batches = started(stall_seconds=0.5)
    pid = next(batches)["pid"]
    os.kill(pid, signal.SIGSTOP)
    reported = threading.Thread(target=continue_once_reported, args=(pid, caplog))
    reported.start()
    for _ in range(10):
        next(batches)
    reported.join()
    assert f"its 1 workers ({pid}) follow" in caplog.text
    os.kill(pid, signal.SIGSTOP)
    loader.close()  # waits some seconds first
    assert pid not in [worker.pid for worker in multiprocessing.active_children()]


class Uneven(IterableDataset):
    """The last worker has ended when the first one's batch comes."""

    def __iter__(self):
        worker, _ = worker_and_count()
        time.sleep(3 * (worker == 0))
        yield WorkerItem(batch={"sources": [worker]})


@pytest.mark.slow
def test_a_worker_that_has_ended_is_not_dead():
    loader = ShardLoader(Uneven(), num_batches=2, num_workers=2, stall_seconds=5)
    assert [batch["sources"] for batch in loader] == [[0], [1]]


class Broken(IterableDataset):
    def __iter__(self):
        yield WorkerItem(batch={"sources": [0]})
        raise RuntimeError("the read timed out")


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_that_speaks_of_time_is_not_waited_for(num_workers):
    loader = ShardLoader(Broken(), num_batches=2, num_workers=num_workers, stall_seconds=5)
    with pytest.raises(RuntimeError, match="the read timed out"):
        list(loader)
