"""How far a run has read the stream: plain numbers that any number of ranks can go on from (no torch here).

The stream is cut into windows, each of as many positions as the batches of one window need. Rank r of R takes every
R-th window; how many workers make its batches does not matter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """What one rank has still to read.

    Attributes:
        pending: Windows to be finished first, with the number of their batches that are done.
        next: The first window after them.
        stride: Every how manieth window is this rank's from there.
    """

    pending: tuple[tuple[int, int], ...] = ()
    next: int = 0
    stride: int = 1

    def windows(self) -> Iterator[tuple[int, int, "Cursor"]]:
        """Yield for ever: a window, the number of its batches that are done, and the cursor after it."""
        cursor = self
        while True:
            if cursor.pending:
                (window, done), *rest = cursor.pending
                cursor = Cursor(pending=tuple(rest), next=cursor.next, stride=cursor.stride)
            else:
                window, done = cursor.next, 0
                cursor = Cursor(next=cursor.next + cursor.stride, stride=cursor.stride)
            yield window, done, cursor

    def within(self, window: int, done: int) -> "Cursor":
        """Return this cursor, which is the one after a window, with only `done` batches of the window done."""
        return Cursor(pending=((window, done), *self.pending), next=self.next, stride=self.stride)

    def to_state(self) -> dict[str, Any]:
        """Return it in plain types, for a checkpoint."""
        return {"pending": [list(pair) for pair in self.pending], "next": self.next, "stride": self.stride}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Cursor":
        """Return the cursor that `to_state` wrote down."""
        pending = tuple((int(window), int(done)) for window, done in state["pending"])
        return cls(pending=pending, next=int(state["next"]), stride=int(state["stride"]))


def first_cursors(world: int, *, window: int = 0) -> list[Cursor]:
    """Return the cursors of all ranks at the beginning, or before a window."""
    return [Cursor(next=window + rank, stride=world) for rank in range(world)]


def unread(cursors: Sequence[Cursor]) -> tuple[list[tuple[int, int]], int]:
    """Return the windows that are not finished, with their done batches, and the first that nobody has begun."""
    begun = max(
        [cursor.next for cursor in cursors] + [w + 1 for cursor in cursors for w, _ in cursor.pending]
    )
    left = [pair for cursor in cursors for pair in cursor.pending]
    left += [(window, 0) for cursor in cursors for window in range(cursor.next, begun, cursor.stride)]
    return sorted(left), begun


def share_out(cursors: Sequence[Cursor], world: int) -> list[Cursor]:
    """Give what is left to another number of ranks: nothing is lost, nothing comes twice.

    The same number of ranks keep their own cursors, and with them the very same batches.
    """
    if len(cursors) == world:
        return list(cursors)
    left, begun = unread(cursors)
    return [
        Cursor(pending=tuple(left[rank::world]), next=begun + rank, stride=world) for rank in range(world)
    ]
