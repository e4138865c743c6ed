"""Rows that `prepare` skips: counted by reason, the first of each in the manifest, all in `left_out.json`."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import to_json, write_atomically
from alignvlm_pl.utils.skipped import SkippedSamples

from .sample import SampleError

logger = logging.getLogger(__name__)
FILE_NAME = "left_out.json"
_LOGGED = 10
_KEPT = 5


@dataclass(kw_only=True, slots=True)
class SkippedRows(SkippedSamples):
    """Skipped rows of a dataset that is prepared: all messages are kept, the first ones logged."""

    keep: int | None = None

    def skip(self, error: SampleError, count: int = 1) -> None:
        """Count rows that fail for the same reason."""
        self.add(error.reason, str(error), count)
        if self.counts.total() <= _LOGGED:
            logger.warning("skipped (%s): %s", error.reason, error)

    def require_written(self, written: int, origin: Path) -> None:
        """Raise DataError with the reasons where no sample of the file or folder `origin` was written."""
        if not written and not self.counts:
            raise DataError(f"{origin} holds no row")
        if not written:
            first = next(iter(self.messages.values()))[0]
            raise DataError(f"{origin}: none of {self.counts.total()} rows is usable ({self}); the first: {first}")

    def extra(self) -> dict[str, Any]:
        """Return the fields of the manifest."""
        first = {reason: messages[:_KEPT] for reason, messages in sorted(self.messages.items())}
        return {"skipped": dict(sorted(self.counts.items())), "skipped_first": first}

    def write(self, folder: Path) -> None:
        """Write reason -> messages of all rows to `left_out.json` beside the manifest."""
        write_atomically(folder / FILE_NAME, to_json(self.messages, indent=2) + "\n")


def read_skipped_rows(folder: Path) -> dict[str, list[str]]:
    """Return reason -> messages from `left_out.json`; empty where it is missing or invalid."""
    try:
        found = json.loads((folder / FILE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def print_skipped_rows(extra: Mapping[str, Any]) -> None:
    """Print a line for each reason that a manifest names."""
    for reason, count in extra["skipped"].items():
        sys.stdout.write(f"skipped: {count} ({reason}); scores over this dataset are marked as incomplete\n")
