"""Counts of rows, and the first skipped ones."""

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from alignvlm_pl.utils.skipped import SkippedSamples

from ...shards.sample import SampleError

MAX_REPORTED = 100
"""Most problems, repeated ids and images of benchmarks that are listed."""


@dataclass(kw_only=True, slots=True)
class Report:
    """Counts of the rows so far."""

    finished: bool = False  # there are no more
    next_row: int = 0  # number of the first one that was not read
    part: int = 0  # number of the part of the last one that was read
    part_rows: int = 0  # rows of that part that were read
    read: int = 0  # rows that are wanted
    written: int = 0  # samples
    images: int = 0
    sources: Counter[str] = field(default_factory=Counter)  # samples by ``source``
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    problems: list[dict[str, Any]] = field(default_factory=list)  # the first skipped: row, reason, message
    overlap: int = 0  # samples with an image that a benchmark holds
    overlap_first: list[dict[str, Any]] = field(default_factory=list)  # the first of them: row, like

    def add_sample(self, source: str, images: int) -> None:
        """Count a sample that is kept."""
        self.written += 1
        self.images += images
        self.sources[source] += 1

    def add_skipped(self, error: SampleError, row: int) -> None:
        """Count a row that is skipped."""
        self.skipped.add(error.reason, str(error))
        if len(self.problems) < MAX_REPORTED:
            self.problems.append({"row": row, "reason": error.reason, "message": str(error)})

    def add_overlap(self, row: int, like: str) -> None:
        """Count a sample with an image of a benchmark."""
        self.overlap += 1
        if len(self.overlap_first) < MAX_REPORTED:
            self.overlap_first.append({"row": row, "like": like})

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(self, default=lambda held: {one.name: getattr(held, one.name) for one in fields(held)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """Read what `to_json` wrote."""
        given = json.loads(text)
        skipped = given["skipped"] | {"counts": Counter(given["skipped"]["counts"])}
        return cls(**given | {"sources": Counter(given["sources"]), "skipped": SkippedSamples(**skipped)})
