"""Rows that `prepare` leaves out: counted by reason, the first of them named in the manifest, all in a file."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm_pl.utils.atomic_files import to_json, write_atomically

from .sample import SampleError

logger = logging.getLogger(__name__)
LEFT_OUT = "left_out.json"
_LOGGED = 10
_KEPT = 5


class LeftOut:
    """Counts the rows that are left out, logs the first ones, and keeps some of each reason for the manifest."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._messages: dict[str, list[str]] = {}

    def add(self, error: SampleError, count: int = 1) -> None:
        """Count rows that fail for the same reason."""
        self._counts[error.reason] += count
        self._messages.setdefault(error.reason, []).append(str(error))
        if self._counts.total() <= _LOGGED:
            logger.warning("left out (%s): %s", error.reason, error)

    def extra(self) -> dict[str, Any]:
        """Return the fields of the manifest (CONTRACT: datamodules/loading/benchmark_dataset.py reports them)."""
        first = {reason: messages[:_KEPT] for reason, messages in sorted(self._messages.items())}
        return {"skipped": dict(sorted(self._counts.items())), "skipped_first": first}

    def write(self, folder: Path) -> None:
        """Write all of them to `left_out.json` beside the manifest: reason -> what is wrong with each row."""
        write_atomically(folder / LEFT_OUT, to_json(self._messages, indent=2) + "\n")


def read_left_out(folder: Path) -> dict[str, list[str]]:
    """Return what `LeftOut.write` has written; nothing where it is missing or does not read."""
    try:
        found = json.loads((folder / LEFT_OUT).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def print_left_out(extra: Mapping[str, Any]) -> None:
    """Print a line for each reason that a manifest names."""
    for reason, count in extra["skipped"].items():
        sys.stdout.write(f"left out: {count} ({reason}); figures over this set are marked as incomplete\n")
