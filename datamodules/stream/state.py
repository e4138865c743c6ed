"""The state of the training data in a checkpoint, and going on from it; plain types: it is read with weights_only."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.utils.collectives import gather

from .batching import BatchPlanner
from .cursor import Cursor, first_cursors, share_out, unread
from .stream import TrainStream

logger = logging.getLogger(__name__)
State = dict[str, Any]
MODES = ("exact", "coarse")
_VERSION = 1


def fingerprint(stream: TrainStream, planner: BatchPlanner, **others: Any) -> dict[str, str]:
    """Describe all that the order and the content of the batches depend on; not the number of ranks and workers.

    Args:
        stream: The stream.
        planner: What cuts it.
        **others: What else counts: processor, text limit, adapter.
    """
    found = {"seed": stream.seed, "shuffle_buffer": stream.buffer, **asdict(planner), **others}
    for source in stream.sources:
        digests = [manifest.sha256[:16] for manifest in source.manifests]
        only = sorted(source.only) if source.only is not None else "all"
        found[f"sets of {source.name}"] = f"{', '.join(digests)} (weight {source.weight:g}, sources {only})"
    return {name: str(value) for name, value in found.items()}


def to_state(
    stream: TrainStream,
    planner: BatchPlanner,
    *,
    identity: Mapping[str, str],
    cursor: Mapping[str, Any],
    seen: Mapping[str, int],
) -> State:
    """Gather the state of all ranks; all of them must call it.

    Args:
        stream: The stream.
        planner: What cuts it.
        identity: Its `fingerprint`.
        cursor: What this rank has still to read.
        seen: Samples this rank was given, by source.
    """
    ranks = gather({"cursor": dict(cursor), "seen": dict(seen)})
    _, begun = unread([Cursor.of_state(rank["cursor"]) for rank in ranks])
    return {
        "version": _VERSION,
        "fingerprint": dict(identity),
        "ranks": [rank["cursor"] for rank in ranks],
        "samples_seen": dict(sum((Counter(rank["seen"]) for rank in ranks), Counter())),
        "epoch_samples": len(stream),
        "window": planner.window,
        # For whoever looks into a checkpoint; the cursors say it exactly.
        "sources": stream.progress(begun * planner.window),
    }


def resumed(
    state: State,
    stream: TrainStream,
    planner: BatchPlanner,
    *,
    identity: Mapping[str, str],
    world: int,
    mode: str,
) -> list[Cursor]:
    """Return the cursors of all ranks after a state.

    Args:
        state: Of `to_state`, perhaps of another number of ranks.
        stream: The stream.
        planner: What cuts it.
        identity: Its `fingerprint`.
        world: Number of ranks now.
        mode: One of `MODES`. `coarse` goes on at the same share of the epoch where data or settings changed.

    Raises:
        ConfigError: Data or settings changed, and the mode is exact; the message names each difference.
    """
    cursors = [Cursor.of_state(cursor) for cursor in state["ranks"]]
    known = state.get("version") == _VERSION
    found = differences(state["fingerprint"] if known else {"version": state.get("version")}, identity)
    if not found:
        return share_out(cursors, world)
    listing = "; ".join(found)
    if mode != "coarse":
        raise ConfigError(
            f"the checkpoint was trained on other batches: {listing}. Restore the setting, or set "
            "data.init_args.resume=coarse to go on at the same share of the epoch, where samples may come twice or not"
        )
    position = unread(cursors)[1] * state["window"] * len(stream) // state["epoch_samples"]
    logger.warning("going on coarsely, at sample %d of the new stream: %s", position, listing)
    return first_cursors(world, window=position // planner.window)


def differences(saved: Mapping[str, Any], identity: Mapping[str, str]) -> Sequence[str]:
    """Say in which settings or data two fingerprints differ."""
    names = [*saved, *(name for name in identity if name not in saved)]
    return [
        f"{name} was {saved.get(name, 'absent')}, is {identity.get(name, 'absent')}"
        for name in names
        if saved.get(name) != identity.get(name)
    ]
