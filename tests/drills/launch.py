"""Run the command line, or a program of a test, in processes of its own without paying for its imports each time.

They are forked from a server, one a test process (tests/drills/server.py). With `FRESH_PROCESSES` in the environment,
as `make drills` has it, the command line runs in a new interpreter instead, and Lightning starts the other ranks.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).parents[2]
RANKS = "LOCAL_RANK NODE_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT PL_GLOBAL_SEED".split()
"""Variables by which a process takes itself for one of several ranks."""
FRESH = "FRESH_PROCESSES"

_server: "subprocess.Popen[str] | None" = None


class Process(Protocol):
    """What a run and `subprocess.Popen` have in common; `pid` is the process group of all ranks and workers, too."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...


class Finished(NamedTuple):
    """How a run ended, and what all its ranks printed."""

    returncode: int
    output: str


class Run:
    """Programs that the server has started together."""

    def __init__(
        self, programs: Sequence[list[Any]], logs: Sequence[Path], environments: Sequence[dict[str, str]]
    ) -> None:
        """Start them.

        Args:
            programs: Of each process, a file of Python code and its arguments.
            logs: Of each process, the file that its output is appended to.
            environments: Of each process, all its variables.
        """
        self._server = _running_server()
        self._returncode: int | None = None
        processes = [
            {"words": [*map(str, words)], "log": str(log), "environment": variables}
            for words, log, variables in zip(programs, logs, environments, strict=True)
        ]
        request = {"processes": processes, "cwd": str(ROOT)}
        assert self._server.stdin
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        """Return the first exit status that is not 0 once all have ended, negative for a signal; None before."""
        if self._returncode is None and select.select([self._server.stdout], [], [], 0)[0]:
            self._returncode = next(filter(None, json.loads(self._answer())), 0)
        return self._returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end; raises `TimeoutError` after `timeout` seconds, and kills all then."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                self.wait(60)
                raise TimeoutError(f"not ended after {timeout:g} s")
            time.sleep(0.02)
        return status

    def _answer(self) -> str:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the server of tests/drills/server.py has ended; its error stands above"
        return line


def start_command(
    words: Sequence[Any], log: Path, *, ranks: int = 1, environment: dict[str, str] | None = None
) -> Process:
    """Start `cli.py` in a process group of its own, on gloo ranks of this machine; its output is appended to `log`."""
    program = [ROOT / "cli.py", *words]
    if FRESH not in os.environ:
        return _start_ranks(program, log, ranks, environment)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, program)], cwd=ROOT, env=_variables() | (environment or {}), stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip


def run_command(
    words: Sequence[Any], *, ranks: int = 1, environment: dict[str, str] | None = None, timeout: float = 250
) -> Finished:
    """Run `cli.py` to its end; see `start_command`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return _finish(start_command(words, log, ranks=ranks, environment=environment), log, timeout)


def run_program(*words: Any, ranks: int = 1, environment: dict[str, str] | None = None, timeout: float = 250) -> str:
    """Run a file of Python code with its arguments, which must end well; returns what all ranks print."""
    return _ended_well(end_program(*words, ranks=ranks, environment=environment, timeout=timeout))


def end_program(
    *words: Any, ranks: int = 1, environment: dict[str, str] | None = None, timeout: float = 250
) -> Finished:
    """As `run_program`, however it ends."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        return _finish(_start_ranks(list(words), log, ranks, environment), log, timeout)


def run_programs(*programs: list[Any], timeout: float = 250) -> list[str]:
    """Run several side by side, which meet without Lightning's variables; returns what each prints."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"log-{number}" for number, _ in enumerate(programs)]
        status = Run(programs, logs, [_variables()] * len(programs)).wait(timeout)
        outputs = [log.read_text(errors="replace") for log in logs]
    assert status == 0, "\n".join(output[-2000:] for output in outputs)
    return outputs


def _start_ranks(program: list[Any], log: Path, ranks: int, environment: dict[str, str] | None) -> Run:
    variables, own = _variables() | (environment or {}), [{}]
    if ranks > 1:
        variables |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
        own = [{"LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return Run([program] * ranks, [log] * ranks, [variables | rank for rank in own])


def _finish(run: Process, log: Path, timeout: float) -> Finished:
    return Finished(run.wait(timeout), log.read_text(errors="replace"))


def _ended_well(done: Finished) -> str:
    assert done.returncode == 0, f"{done.returncode}: {done.output[-3000:]}"
    return done.output


def _variables() -> dict[str, str]:
    """Those of this process, but that it is no rank; one thread, and no network."""
    own = {name: value for name, value in os.environ.items() if name not in RANKS}
    return own | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "HF_HUB_OFFLINE": "1"}


def _running_server() -> "subprocess.Popen[str]":
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.server"], cwd=ROOT, env=_variables(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(_server.kill)
    return _server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
