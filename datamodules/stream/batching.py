"""Windows of the stream -> batches: in stream order, sorted by length, or packed to a token budget (no torch here)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .stream import permutation

Row = list[int]
"""Positions of the samples that share a row of a batch; one, unless rows are packed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlanner:
    """Cuts windows of the stream into batches of `batch_size` rows, the same for each window whenever it is cut.

    Attributes:
        length_window: Batches whose samples are sorted by length together; 1 keeps the order of the stream.
        token_budget: Tokens of a packed row; None: every sample has a row of its own.
        pack_window: Samples that are packed together.
        seed: Seed of the order of the batches of a window.
    """

    batch_size: int
    length_window: int = 1
    token_budget: int | None = None
    pack_window: int = 256
    seed: str = "0"

    @property
    def window(self) -> int:
        """Positions of one window."""
        return self.pack_window if self.token_budget else self.batch_size * self.length_window

    def plan(self, window: int, lengths: Callable[[Sequence[int]], list[int]]) -> list[list[Row]]:
        """Return the batches of a window, by its number from 0.

        `lengths` maps positions to tokens of their samples, 0 for one that cannot be measured; reading it raises the
        reason. It is called only if the plan depends on it.
        """
        positions = list(range(window * self.window, (window + 1) * self.window))
        rows: list[Row] = [[position] for position in positions]
        if self.token_budget:
            rows = fill_rows(positions, lengths(positions), self.token_budget)
        elif self.length_window > 1:
            known = dict(zip(positions, lengths(positions), strict=True))
            rows.sort(key=lambda row: known[row[0]])  # stable: equal lengths keep the order of the stream
        batches = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        if len(batches) == 1:
            return batches
        # Permuted, or the loss would oscillate with the length.
        return [batches[index] for index in permutation(len(batches), self.seed, "batches", window)]


def fill_rows(positions: Sequence[int], lengths: Sequence[int], budget: int) -> list[Row]:
    """Put samples into rows of at most `budget` tokens: longest first, each where it leaves the least room.

    A sample that is longer than the budget gets its own row; reading it skips it. Samples of a row are in stream order.
    """
    rows: list[Row] = []
    room: list[int] = []
    for length, position in sorted(zip(lengths, positions, strict=True), key=lambda pair: (-pair[0], pair[1])):
        fitting = [number for number, left in enumerate(room) if left >= length]
        best = min(fitting, key=lambda number: room[number], default=None)
        if best is None:
            rows.append([position])
            room.append(max(budget - length, 0))
        else:
            rows[best].append(position)
            room[best] -= length
    return [sorted(row) for row in rows]
