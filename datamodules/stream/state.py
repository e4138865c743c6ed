"""How far the ranks have read the training stream: their cursors, the state in a checkpoint, and resuming from it.

The stream is cut into windows, each of as many positions as its batches need. Rank r of R reads every R-th window; the
number of workers does not matter. The state has plain types only, so that checkpoints load with `weights_only`.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.utils.collectives import gather

from .batching import BatchPlanner
from .stream import TrainStream

logger = logging.getLogger(__name__)
State = dict[str, Any]
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """The windows of the stream that one rank has still to read.

    First `pending` ones, each with the number of its batches that are done; then every `stride`-th from `next`.
    """

    pending: tuple[tuple[int, int], ...] = ()
    next: int = 0
    stride: int = 1

    def windows(self) -> Iterator[tuple[int, int, "Cursor"]]:
        """Yield without end: a window, the number of its batches that are done, and the cursor after it."""
        cursor = self
        while True:
            if cursor.pending:
                window, done = cursor.pending[0]
                cursor = replace(cursor, pending=cursor.pending[1:])
            else:
                window, done = cursor.next, 0
                cursor = replace(cursor, next=cursor.next + cursor.stride)
            yield window, done, cursor

    def within(self, window: int, done: int) -> "Cursor":
        """Return this cursor, which is the one after a window, with only `done` batches of the window done."""
        return replace(self, pending=((window, done), *self.pending))

    def state_dict(self) -> dict[str, Any]:
        """Return plain types for a checkpoint."""
        return {"pending": [list(pair) for pair in self.pending], "next": self.next, "stride": self.stride}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Cursor":
        """Return the cursor of a `state_dict`."""
        pending = tuple((int(window), int(done)) for window, done in state["pending"])
        return cls(pending=pending, next=int(state["next"]), stride=int(state["stride"]))


def first_cursors(world_size: int, *, window: int = 0) -> list[Cursor]:
    """Return the cursors of all ranks at the beginning, or before a window."""
    return [Cursor(next=window + rank, stride=world_size) for rank in range(world_size)]


def unfinished_windows(cursors: Sequence[Cursor]) -> tuple[list[tuple[int, int]], int]:
    """Return the unfinished windows, each with its number of done batches, and the first that no rank has begun."""
    begun = max([cursor.next for cursor in cursors] + [w + 1 for cursor in cursors for w, _ in cursor.pending])
    left = [pair for cursor in cursors for pair in cursor.pending]
    left += [(window, 0) for cursor in cursors for window in range(cursor.next, begun, cursor.stride)]
    return sorted(left), begun


def redistribute(cursors: Sequence[Cursor], world_size: int) -> list[Cursor]:
    """Distribute the unfinished windows over another number of ranks: each is read exactly once.

    The same number of ranks keep their own cursors, and with them the same batches.
    """
    if len(cursors) == world_size:
        return list(cursors)
    left, begun = unfinished_windows(cursors)
    fresh = first_cursors(world_size, window=begun)
    return [replace(cursor, pending=tuple(left[rank::world_size])) for rank, cursor in enumerate(fresh)]


def fingerprint(stream: TrainStream, planner: BatchPlanner, **others: Any) -> dict[str, str]:
    """Describe everything that the batches depend on; `others` are settings of processor, text limit and adapter."""
    found = {"seed": stream.seed, "shuffle_buffer": stream.buffer, **asdict(planner), **others}
    for source in stream.sources:
        digests = [manifest.sha256[:16] for manifest in source.manifests]
        only = sorted(source.only) if source.only is not None else "all"
        found[f"sets of {source.name}"] = f"{', '.join(digests)} (weight {source.weight:g}, sources {only})"
    return {name: str(value) for name, value in found.items()}


def gather_state(
    stream: TrainStream,
    planner: BatchPlanner,
    *,
    identity: Mapping[str, str],
    cursor: Mapping[str, Any],
    seen: Mapping[str, int],
) -> State:
    """Gather the state of all ranks, all of which must call it.

    `identity` is the `fingerprint`, `cursor` the `Cursor.state_dict` of this rank, `seen` source -> samples trained on.
    """
    ranks = gather({"cursor": dict(cursor), "seen": dict(seen)})
    _, begun = unfinished_windows([Cursor.from_state_dict(rank["cursor"]) for rank in ranks])
    return {
        "version": _VERSION,
        "fingerprint": dict(identity),
        "ranks": [rank["cursor"] for rank in ranks],
        "samples_seen": dict(sum((Counter(rank["seen"]) for rank in ranks), Counter())),
        "epoch_samples": len(stream),
        "window": planner.window,
        # For people to read; the cursors are exact.
        "sources": stream.progress(begun * planner.window),
    }


def resume_cursors(
    state: State,
    stream: TrainStream,
    planner: BatchPlanner,
    *,
    identity: Mapping[str, str],
    world_size: int,
    mode: str,
) -> list[Cursor]:
    """Return the cursors of all ranks that resume from a `state` of `gather_state`, on any number of ranks.

    `identity` is the `fingerprint` of stream and planner. Data or settings that changed are a ConfigError that names
    each difference with the `mode` ``exact``; with ``coarse`` the run resumes at the same share of the epoch.
    """
    cursors = [Cursor.from_state_dict(cursor) for cursor in state["ranks"]]
    known = state.get("version") == _VERSION
    found = differences(state["fingerprint"] if known else {"version": state.get("version")}, identity)
    if not found:
        return redistribute(cursors, world_size)
    listing = "; ".join(found)
    if mode != "coarse":
        raise ConfigError(
            f"the checkpoint was trained on other batches: {listing}. Restore the setting, or set "
            "data.init_args.resume=coarse to resume at the same share of the epoch, with samples repeated or missed"
        )
    position = unfinished_windows(cursors)[1] * state["window"] * len(stream) // state["epoch_samples"]
    logger.warning("resuming coarsely at sample %d of the new stream: %s", position, listing)
    return first_cursors(world_size, window=position // planner.window)


def differences(saved: Mapping[str, Any], identity: Mapping[str, str]) -> Sequence[str]:
    """Describe each difference between two fingerprints."""
    names = [*saved, *(name for name in identity if name not in saved)]
    return [
        f"{name} was {saved.get(name, 'absent')}, is {identity.get(name, 'absent')}"
        for name in names
        if saved.get(name) != identity.get(name)
    ]
