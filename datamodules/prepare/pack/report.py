"""Counts of rows and the first skipped ones, by part and for all parts."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from alignvlm_pl.utils.skipped import SkippedSamples

from ...shards.sample import SampleError

MAX_REPORTED = 100
"""Most problems, repeated ids and images of benchmarks that are listed."""


@dataclass(kw_only=True, slots=True)
class PartReport:
    """Counts for the rows of one part, or of all parts after `merge_reports`."""

    part: str = ""
    read: int = 0  # rows
    written: int = 0  # samples
    images: int = 0
    sources: Counter[str] = field(default_factory=Counter)  # samples by ``source``
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    problems: list[dict[str, Any]] = field(default_factory=list)  # the first skipped: part, row, reason, message
    overlap: int = 0  # samples with an image that a benchmark holds
    overlap_first: list[dict[str, Any]] = field(default_factory=list)  # the first of them: part, row, like

    def add_sample(self, source: str, images: int) -> None:
        """Count a sample that is kept."""
        self.written += 1
        self.images += images
        self.sources[source] += 1

    def add_skipped(self, error: SampleError, row: int) -> None:
        """Count a row that is skipped."""
        self.skipped.add(error.reason, str(error))
        self.problems.append({"part": self.part, "row": row, "reason": error.reason, "message": str(error)})
        del self.problems[MAX_REPORTED:]

    def add_overlap(self, row: int, like: str) -> None:
        """Count a sample with an image of a benchmark."""
        self.overlap += 1
        self.overlap_first.append({"part": self.part, "row": row, "like": like})
        del self.overlap_first[MAX_REPORTED:]

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps(self, default=lambda held: {one.name: getattr(held, one.name) for one in fields(held)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "PartReport":
        """Read what `to_json` wrote."""
        given = json.loads(text)
        skipped = given["skipped"] | {"counts": Counter(given["skipped"]["counts"])}
        return cls(**given | {"sources": Counter(given["sources"]), "skipped": SkippedSamples(**skipped)})


def merge_reports(reports: Iterable[PartReport]) -> PartReport:
    """Add up the reports of parts, in their order."""
    total = PartReport()
    for report in reports:
        for name in ("read", "written", "images", "sources", "overlap", "problems", "overlap_first"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
        total.skipped.merge(report.skipped)
        del total.problems[MAX_REPORTED:], total.overlap_first[MAX_REPORTED:]
    return total
