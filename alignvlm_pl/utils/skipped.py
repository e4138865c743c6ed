"""Skipped samples: how many for which reason, and the first of each."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class SkippedSamples:
    """Number of skipped samples, or rows of raw data, by reason, with the first `keep` messages of each; None: all."""

    keep: int | None = 5
    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, message: str, count: int = 1) -> None:
        """Count samples that are skipped for one reason."""
        self.counts[reason] += count
        kept = self.messages.setdefault(reason, [])
        if self.keep is None or len(kept) < self.keep:
            kept.append(message)

    def merge(self, other: "SkippedSamples") -> None:
        """Add the counts of another one, and its messages as far as there is room."""
        self.counts += other.counts
        for reason, messages in other.messages.items():
            kept = self.messages.setdefault(reason, [])
            kept += messages if self.keep is None else messages[: self.keep - len(kept)]

    def __str__(self) -> str:
        """Reasons and numbers, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason}: {number}" for reason, number in ordered) or "nothing skipped"
