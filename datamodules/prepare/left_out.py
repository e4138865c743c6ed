"""Rows that `prepare` leaves out: counted by reason, the first of them named."""

import logging
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..sample import SampleError

logger = logging.getLogger(__name__)
_LOGGED = 10
_KEPT = 5


class LeftOut:
    """Counts the rows that are left out, logs the first ones, and keeps some of each reason for the manifest."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def add(self, error: SampleError, count: int = 1) -> None:
        """Count rows that fail for the same reason."""
        self._counts[error.reason] += count
        first = self._first.setdefault(error.reason, [])
        if len(first) < _KEPT:
            first.append(str(error))
        if self._counts.total() <= _LOGGED:
            logger.warning("left out (%s): %s", error.reason, error)

    def extra(self) -> dict[str, Any]:
        """Return the fields of the manifest (CONTRACT: datamodules/benchmark_set.py reports them)."""
        return {
            "skipped": dict(sorted(self._counts.items())),
            "skipped_first": dict(sorted(self._first.items())),
        }


def print_left_out(extra: Mapping[str, Any]) -> None:
    """Print a line for each reason that a manifest names."""
    for reason, count in extra["skipped"].items():
        sys.stdout.write(f"left out: {count} ({reason}); figures over this set are marked as incomplete\n")
