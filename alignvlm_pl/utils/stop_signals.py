"""The request to stop: a flag that SIGUSR1 and SIGTERM set in the main process, and nothing else (no torch here).

Nothing is saved inside a handler: it runs in the middle of a step, where another collective may be under way.
`callbacks.preemption` looks at the flag between steps.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 85
"""Exit status of a run that was asked to stop and has saved (CONTRACT: configs/cluster/submit.sbatch requeues it)."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

_received: list[str] = []


def received() -> str | None:
    """Name of the first signal that asked this process to stop; None where none did."""
    return _received[0] if _received else None


def listen() -> dict[signal.Signals, Any]:
    """Take the signals as requests to stop from now on; returns the earlier handlers."""
    main_pid = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == main_pid:  # a forked process has this handler, too
            _received.append(signal.Signals(number).name)

    earlier = {number: signal.signal(number, note) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)  # a write to a network file system must not fail in the middle
    return earlier


def hold_back() -> None:
    """Let the signals wait until `listen_again` or `release`, in this thread and the processes that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def listen_again() -> None:
    """As `listen`, where another handler was installed meanwhile, and deliver what was held back."""
    if threading.current_thread() is threading.main_thread():
        listen()
    release()


def release() -> None:
    """Deliver what was held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


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
