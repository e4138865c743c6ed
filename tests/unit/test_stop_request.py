"""The flag that SIGUSR1 and SIGTERM set."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from alignvlm_pl.utils.stop_signals import EXIT_CODE, SIGNALS, listening, received

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_sets_the_flag_and_nothing_else(name):
    before = [signal.getsignal(number) for number in SIGNALS]
    with listening():
        assert received() is None
        for _ in range(3):
            os.kill(os.getpid(), getattr(signal, name))
        assert received() == name
    assert received() is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_forked_child_s_signal_is_not_the_main_process_s():
    with listening():
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(7 if received() is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_outside_of_the_main_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGUSR1), []

    def run() -> None:
        with listening():
            found.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("first", ["listen_until_exit()", "pass"])
def test_a_finished_run_is_not_killed_by_a_signal_that_comes_as_it_ends(first):
    program = (
        "import atexit, os, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))  # after what is registered later\n"
        "from alignvlm_pl.utils.stop_signals import listen_until_exit\n"
        f"{first}"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == (0 if first != "pass" else -signal.SIGTERM)


def test_the_status_is_none_that_a_shell_or_python_gives():
    assert EXIT_CODE not in (0, 1, 2, 126, 127)
    assert EXIT_CODE < 128
