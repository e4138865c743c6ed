"""The request to stop: a flag that signals set in the main process, and nothing else (no torch here).

Nothing is saved inside a handler: it runs in the middle of a step, where another collective may be under way.
`callbacks.preemption` looks at the flag between steps. A scheduler sends SIGUSR1 or SIGTERM; Ctrl-C is SIGINT, and a
terminal that is closed sends SIGHUP. A second Ctrl-C ends the process at once.
"""

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

EXIT_CODE = 85
"""Exit status of a run that was asked to stop and has saved (CONTRACT: configs/cluster/submit.sbatch requeues it)."""

INTERRUPTED = 130
"""Exit status after Ctrl-C or a closed terminal, as of a shell: nobody starts the run again."""

REQUESTS = (signal.SIGUSR1, signal.SIGTERM)
"""Of a scheduler, which starts the run again."""
INTERRUPTS = (signal.SIGINT, signal.SIGHUP)
"""Of a person."""
SIGNALS = (*REQUESTS, *INTERRUPTS)

_SAME_PRESS_S = 0.3
"""A launcher passes the SIGINT on that the terminal has sent already: two within this time are one Ctrl-C."""

_received: list[str] = []
_interrupted_at: list[float] = []


progress = 0, 0
"""Optimizer steps that are trained, and those in the newest checkpoint (set by the callbacks of a fit)."""


def exit_status(names: list[str]) -> int:
    """Return the exit status of a run that has saved after signals of these names."""
    return INTERRUPTED if {signal.Signals[name] for name in names} & {*INTERRUPTS} else EXIT_CODE


def received() -> str | None:
    """Name of the first signal that asked this process to stop; None where none did."""
    return _received[0] if _received else None


def listen() -> dict[signal.Signals, Any]:
    """Take the signals as requests to stop from now on; returns the earlier handlers.

    Interrupts that are ignored stay so, as SIGHUP is under `nohup`.
    """
    main_pid = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main_pid:  # a forked process has this handler, too
            return
        if number == signal.SIGINT:
            _interrupt()
        _received.append(signal.Signals(number).name)

    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if number in INTERRUPTS and earlier[number] == signal.SIG_IGN:
            continue
        signal.signal(number, note)
        signal.siginterrupt(number, False)  # a write to a network file system must not fail in the middle
    return earlier


def _interrupt() -> None:
    """Say what Ctrl-C does; at the second one end the process."""
    now = time.monotonic()
    if _interrupted_at and now - _interrupted_at[-1] < _SAME_PRESS_S:
        return
    _interrupted_at.append(now)
    if len(_interrupted_at) == 1:
        _say("interrupted: leaving as soon as nothing is lost; Ctrl-C again leaves at once, without saving")
        return
    trained, saved = progress
    _say(f"left at once: lost are {trained - saved} steps behind the checkpoint of step {saved}, and the one under way")
    os._exit(INTERRUPTED)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{text}\n".encode())  # not `print`, which the handler may have interrupted


def hold_back() -> None:
    """Let a scheduler's signals wait until `listen_again` or `release`, in this thread and the processes it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)


def listen_again() -> None:
    """As `listen`, where another handler was installed meanwhile, and deliver what was held back."""
    if threading.current_thread() is threading.main_thread():
        listen()
    release()


def release() -> None:
    """Deliver what was held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


def listen_until_exit() -> None:
    """As `listen`, and ignore the signals while the interpreter ends: one would make a killed run of a finished one."""
    listen()
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in SIGNALS])


@contextmanager
def listening() -> Iterator[None]:
    """Take the signals as requests to stop while the block runs; outside of the main thread they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = listen()
    try:
        yield
    finally:
        release()
        for number, handler in earlier.items():
            signal.signal(number, handler)
        _received.clear()
        _interrupted_at.clear()
