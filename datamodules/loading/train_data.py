"""The training loader with its state, put together of stream, planner and cursors."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.preprocessing.batch import Batch

from ..shards.decode import Decoder, SkipCounter
from ..shards.index import load_index
from ..shards.manifest import Manifest, verify_shard
from ..shards.sample import Sample
from ..stream.batching import BatchPlanner
from ..stream.state import State, differences, fingerprint, first_cursors, gather_state, resume_cursors
from ..stream.stream import Source, TrainStream
from .collate import Collator, Processor
from .loader import ShardLoader, TrainBatches

_MEASURED_SHARDS = 64
_BYTES_A_TOKEN = 4  # of text, roughly; only the nominal length of an epoch depends on it


@dataclass(kw_only=True)
class MixtureSource:
    """One source of a weighted mixture.

    Args:
        sets: Folders of its sets; several are concatenated.
        weight: Its share of the samples; the weights of a mixture need not sum to 1. Samples, not tokens: a page of
            nine tiles is one sample.
    """

    sets: list[str | Path] = field(default_factory=list)
    weight: float = 1.0

    def load(self, name: str, load: Callable[[str | Path], Manifest], only: frozenset[str] | None) -> Source:
        """Return the source with its manifests read.

        Args:
            name: Its name in the mixture.
            load: Folder -> manifest.
            only: See `Source`.

        Raises:
            ConfigError: It has no sets.
        """
        if not self.sets:
            raise ConfigError(
                f"data.init_args.mixture.{name}.sets names no folder; give at least one dataset, or leave the "
                "source out"
            )
        return Source(name=name, manifests=tuple(map(load, self.sets)), weight=self.weight, only=only)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A running training loader and what its state needs.

    Attributes:
        stream: Position -> sample.
        planner: Window -> batches.
        identity: See `stream.state.fingerprint`.
        batches: Makes the batches.
        loader: The batches of this rank.
        start: `Cursor.state_dict` of this rank at the beginning.
        seen_before: Samples of earlier runs by source; of rank 0, which keeps those of all.
        verified: Shards whose checksum `read` has compared.
    """

    stream: TrainStream
    planner: BatchPlanner
    identity: dict[str, str]
    batches: TrainBatches
    loader: ShardLoader
    start: dict[str, Any]
    seen_before: dict[str, int]
    verified: set[str] = field(default_factory=set)

    @classmethod
    def begin(
        cls,
        stream: TrainStream,
        planner: BatchPlanner,
        *,
        collator: Collator,
        decoder: Decoder,
        counter: SkipCounter | None,
        rank: int,
        world_size: int,
        state: State | None,
        mode: str,
        num_batches: int,
        num_workers: int,
        step_batches: int,
        stall_seconds: float | None,
    ) -> "Training":
        """Prepare the batches of one rank, from a state or from the beginning.

        Args:
            stream: Position -> sample.
            planner: Window -> batches.
            collator: Sample -> batch.
            decoder: Raw sample -> sample.
            counter: Of bad samples.
            rank: Of this process.
            world_size: Number of ranks.
            state: Of a checkpoint; None begins anew.
            mode: See `stream.state.resume_cursors`.
            num_batches: Batches of an epoch.
            num_workers: Worker processes.
            step_batches: Micro batches of an optimizer step.
            stall_seconds: See `ShardLoader`.

        Raises:
            ConfigError: The state is of other data or settings.
        """
        identity = fingerprint(
            stream,
            planner,
            max_text_length=collator.max_text_length,
            members=getattr(decoder.adapter, "__qualname__", repr(decoder.adapter)),
            **{f"processor.{name}": value for name, value in collator.processor.identity().items()},
        )
        cursors = (
            first_cursors(world_size)
            if state is None
            else resume_cursors(state, stream, planner, identity=identity, world_size=world_size, mode=mode)
        )
        batches = TrainBatches(
            stream=stream,
            planner=planner,
            cursor=cursors[rank],
            decoder=decoder,
            collator=collator,
            counter=counter,
        )
        loader = ShardLoader(
            batches,
            num_batches=num_batches,
            num_workers=num_workers,
            step_batches=step_batches,
            stall_seconds=stall_seconds,
        )
        before = state["samples_seen"] if state is not None and rank == 0 else {}
        start = cursors[rank].state_dict()
        return cls(
            stream=stream,
            planner=planner,
            identity=identity,
            batches=batches,
            loader=loader,
            start=start,
            seen_before=before,
        )

    def require_identity(self, recorded: Mapping[str, str]) -> None:
        """Compare the fingerprint of the data with that of a run.

        Raises:
            DataError: They differ, naming each difference.
        """
        if listing := "; ".join(differences(recorded, self.identity)):
            raise DataError(f"the run was trained on other data or settings: {listing}; restore them")

    def read(self, positions: Sequence[int], *, per_row: Sequence[int] | None = None) -> tuple[Batch, list[Sample]]:
        """Read one micro batch again, as it was trained on; the checksums of its shards are verified.

        Args:
            positions: Global indices of its samples in the stream.
            per_row: Samples of each row of a packed batch; None: one.

        Returns:
            The batch and its samples.

        Raises:
            DataError: A shard has changed, or a sample cannot be read.
        """
        items = []
        for position in positions:
            location = self.stream.locate(position)
            where = location.manifest.where(location.shard.path)
            # A fetched shard was compared with its checksum when it was fetched.
            if where not in self.verified and not location.manifest.is_remote:
                path = location.manifest.shard_path(location.shard)
                verify_shard(path, location.shard, verify_sha256=True)
                self.verified.add(where)
            item = self.batches.read(position)
            if item is None:
                raise DataError(f"the sample at position {position} of the training stream is skipped")
            items.append(item)
        rest = iter(items)
        rows = [list(islice(rest, count)) for count in per_row or [1] * len(items)]
        return self.batches.collate(rows), [item.sample for item in items]

    def state_dict(self) -> State:
        """Return the state of all ranks; all of them must call it."""
        return gather_state(
            self.stream,
            self.planner,
            identity=self.identity,
            cursor=self.loader.cursor or self.start,
            seen=Counter(self.seen_before) + self.loader.seen,
        )


def packed_rows(stream: TrainStream, *, processor: Processor, budget: int) -> int:
    """Estimate how many rows of a token budget an epoch fills, from sizes and bytes in the indexes of the shards.

    Of more than 64 shards of a source, 64 evenly spread ones are measured.
    """
    tokens = 0.0
    for source in stream.sources:
        step = -(-len(source.shards) // _MEASURED_SHARDS)
        measured = samples = 0
        for number in range(0, len(source.shards), step):
            index = load_index(*source.shards[number])
            chosen = source.chosen[number]
            samples += len(chosen)
            measured += sum(
                processor.visual_tokens(index.sizes[n]) + index.text_bytes[n] // _BYTES_A_TOKEN for n in chosen
            )
        tokens += measured / max(samples, 1) * len(source)
    return int(tokens / budget)


def at_least(least: int, **settings: float) -> None:
    """Refuse settings that are too small.

    Raises:
        ConfigError: Naming the first.
    """
    for name, value in settings.items():
        if value < least:
            raise ConfigError(f"data.init_args.{name}={value}: expected at least {least}")


def shares(**settings: float) -> None:
    """Refuse settings that are no share.

    Raises:
        ConfigError: Naming the first.
    """
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"data.init_args.{name}={value}: expected a share in [0, 1]")
