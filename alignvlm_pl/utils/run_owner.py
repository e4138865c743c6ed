"""One owner of a run folder: a file with host, process and start, so that no two runs write into it (no torch here).

Its content decides, not a lock of the system, which network file systems do not share and forked workers inherit. A
lock is held only while the file is read and written: without it, two hosts that start in one moment are not told apart.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError


@contextmanager
def owned(path: Path, *, job: str | None = None, restarts: int = 0) -> Iterator[None]:
    """Own the folder of `path`, a JSON file, while the block runs; the first rank does so for all ranks.

    A file that a dead process of this host has left is taken over, and so is that of an earlier start of the same `job`
    of a scheduler, which never runs one twice at once.

    Raises:
        ConfigError: Another run owns the folder, or one of another host may do so; nothing is written.
    """
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start(os.getpid()),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "job": job,
        "restarts": restarts,
    }
    try:
        with _locked(path) as stream:
            if problem := _problem(_read(stream), own, path):
                raise ConfigError(problem)
            stream.truncate(0)
            stream.write(json.dumps(own) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): expected a file of a run; remove it"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError), _locked(path) as stream:
            if _read(stream) == own:
                path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Open the file for reading and appending; no other process of this host has it open within."""
    while True:
        with path.open("a+", encoding="utf-8") as stream:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            same = False
            with suppress(FileNotFoundError):
                same = os.path.samestat(os.fstat(stream.fileno()), path.stat())
            if same:  # not removed meanwhile
                yield stream
                return


def _read(stream: IO[str]) -> dict[str, Any] | None:
    """Return the owner in the file; None where there is none, or a killed process wrote a part of it."""
    stream.seek(0)
    try:
        found = json.loads(stream.read())
        return found if isinstance(found, dict) and {"host", "pid", "since"} <= found.keys() else None
    except ValueError:
        return None


def _problem(found: dict[str, Any] | None, own: dict[str, Any], path: Path) -> str | None:
    if found is None:
        return None
    if own["job"] is not None and found.get("job") == own["job"] and own["restarts"] > found.get("restarts", 0):
        return None  # an earlier start of this job, on whichever host
    who = f"host {found['host']}, pid {found['pid']}, since {found['since']}, {_age(found['since'])} ago"
    if found["host"] != own["host"]:
        return (
            f"another run may be writing into {path.parent} ({who}), which cannot be seen from {own['host']}; if it "
            f"has ended, remove {path}, else choose another run_dir"
        )
    if _start(found["pid"]) != found.get("start"):
        return None  # it has ended; another process may have its number
    return f"another run is writing into {path.parent} ({who}); wait for it or end it, or choose another run_dir"


def _start(pid: int) -> int | None:
    """Return when a process of this host began, in ticks since the boot (0: unknown); None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


def _age(since: str) -> str:
    try:
        minutes = (datetime.now(timezone.utc) - datetime.fromisoformat(since)).total_seconds() / 60
    except (TypeError, ValueError):  # edited by hand
        return "an unknown time"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
