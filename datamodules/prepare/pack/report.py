"""Counts of rows and the first skipped ones, by part and for all parts."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from ...shards.sample import SampleError

MAX_REPORTED = 100
"""Most problems, repeated ids and images of benchmarks that are listed."""
_MAX_PER_REASON = 5


@dataclass(kw_only=True, slots=True)
class PartReport:
    """Counts for the rows of one part, or of all parts after `merge_reports`.

    Attributes:
        part: Name of the part.
        cap: Limit of rows to read.
        read: Rows that were read.
        written: Samples.
        images: Images of the samples.
        sources: Samples by ``source``.
        skipped: Rows that were skipped, by reason.
        skipped_first: The first messages of each reason.
        problems: The first rows that were skipped: ``part``, ``row``, ``reason``, ``message``.
        overlap: Samples with an image that a benchmark holds.
        overlap_first: The first of them: ``part``, ``row``, ``like``.
    """

    part: str = ""
    cap: int | None = None
    read: int = 0
    written: int = 0
    images: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_first: dict[str, list[str]] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    overlap: int = 0
    overlap_first: list[dict[str, Any]] = field(default_factory=list)

    def add_sample(self, source: str, images: int) -> None:
        """Count a sample that is kept."""
        self.written += 1
        self.images += images
        self.sources[source] += 1

    def add_skipped(self, error: SampleError, row: int) -> None:
        """Count a row that is skipped."""
        self.skipped[error.reason] += 1
        # Lone surrogates cannot be written to a file.
        message = str(error).encode("utf-8", "backslashreplace").decode()
        first = self.skipped_first.setdefault(error.reason, [])
        if len(first) < _MAX_PER_REASON:
            first.append(message)
        if len(self.problems) < MAX_REPORTED:
            self.problems.append({"part": self.part, "row": row, "reason": error.reason, "message": message})

    def add_overlap(self, row: int, like: str) -> None:
        """Count a sample with an image of a benchmark."""
        self.overlap += 1
        if len(self.overlap_first) < MAX_REPORTED:
            self.overlap_first.append({"part": self.part, "row": row, "like": like})

    def to_json(self) -> bytes:
        """Return what `from_json` reads."""
        return json.dumps(
            {one.name: getattr(self, one.name) for one in fields(self)}, ensure_ascii=False
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "PartReport":
        """Read what `to_json` wrote."""
        given = json.loads(data)
        return cls(**given | {name: Counter(given[name]) for name in ("sources", "skipped")})


def merge_reports(reports: Iterable[PartReport]) -> PartReport:
    """Add up the reports of parts, in their order."""
    total = PartReport()
    for report in reports:
        for name in ("read", "written", "images", "sources", "skipped", "overlap"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
        for reason, messages in report.skipped_first.items():
            kept = total.skipped_first.setdefault(reason, [])
            kept += messages[: _MAX_PER_REASON - len(kept)]
        total.problems += report.problems[: MAX_REPORTED - len(total.problems)]
        total.overlap_first += report.overlap_first[: MAX_REPORTED - len(total.overlap_first)]
    return total


def format_counts(skipped: Counter[str]) -> str:
    """Format reasons and counts for a message, the most frequent first."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason}: {number}" for reason, number in ordered) or "nothing skipped"
