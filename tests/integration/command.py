"""The real command line in processes of its own, which must end well."""

from typing import Any

from tests.drills.launch import run_command


def cli(*options: Any, ranks: int = 1) -> str:
    """Run it on this number of ranks; returns what they print."""
    done = run_command(options, ranks=ranks, timeout=150)
    assert done.returncode == 0, done.output[-3000:]
    return done.output
