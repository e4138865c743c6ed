"""The training loader with its state: stream, planner and cursors together."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.preprocessing.batch import Batch

from ..shards.index import load_index
from ..shards.manifest import Manifest, verify_shard
from ..shards.sample import Sample
from ..stream.state import State, differences, fingerprint, first_cursors, gather_state, resume_cursors
from ..stream.stream import Source, TrainStream
from .loader import ShardLoader, TrainBatches

if TYPE_CHECKING:
    from alignvlm_pl.models.processing import AlignVLMProcessor

_MEASURED_SHARDS = 64
_BYTES_A_TOKEN = 4  # of text, an estimate: only the nominal length of an epoch depends on it


@dataclass(kw_only=True)
class MixtureSource:
    """One source of a weighted mixture.

    Args:
        sets: Folders of its datasets; several are concatenated.
        weight: Its share of the samples (not of the tokens); the weights of a mixture need not sum to 1.
    """

    sets: list[str | Path] = field(default_factory=list)
    weight: float = 1.0

    def load(self, name: str, load: Callable[[str | Path], Manifest], only: frozenset[str] | None) -> Source:
        """Return the source `name` with the manifests that `load` reads; raise ConfigError where it has no dataset."""
        if not self.sets:
            raise ConfigError(
                f"data.init_args.mixture.{name}.sets names no folder; give at least one dataset, or leave the "
                "source out"
            )
        return Source(name=name, manifests=tuple(map(load, self.sets)), weight=self.weight, only=only)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A running training loader and the batches of this rank, from its first cursor.

    Attributes:
        identity: See `stream.state.fingerprint`.
        seen_before: Source -> samples that earlier runs trained on; rank 0 has those of all ranks.
        verified: Shards whose checksum `read` has compared.
    """

    batches: TrainBatches
    loader: ShardLoader
    identity: dict[str, str]
    seen_before: dict[str, int]
    verified: set[str] = field(default_factory=set)

    @classmethod
    def begin(
        cls, batches: TrainBatches, *, rank: int, world_size: int, state: State | None, mode: str, **loading: Any
    ) -> "Training":
        """Set the cursor of the batches of one rank, by the state of a checkpoint or to the first sample.

        `mode` and its ConfigError are those of `resume_cursors`, `loading` are settings of `ShardLoader`.
        """
        stream, planner, collator, adapter = batches.stream, batches.planner, batches.collator, batches.decoder.adapter
        identity = fingerprint(
            stream,
            planner,
            max_text_length=collator.max_text_length,
            members=getattr(adapter, "__qualname__", repr(adapter)),
            **({} if collator.visual_share == 1 else {"visual_share": collator.visual_share}),
            **{f"processor.{name}": value for name, value in collator.processor.identity().items()},
        )
        cursors = (
            first_cursors(world_size)
            if state is None
            else resume_cursors(state, stream, planner, identity=identity, world_size=world_size, mode=mode)
        )
        batches.cursor = cursors[rank]
        before = state["samples_seen"] if state is not None and rank == 0 else {}
        return cls(batches=batches, loader=ShardLoader(batches, **loading), identity=identity, seen_before=before)

    def require_identity(self, recorded: Mapping[str, str]) -> None:
        """Compare the fingerprint of the data with that of a run; DataError with each difference."""
        if listing := "; ".join(differences(recorded, self.identity)):
            raise DataError(f"the run was trained on other data or settings: {listing}; restore them")

    def read(self, positions: Sequence[int], *, per_row: Sequence[int] | None = None) -> tuple[Batch, list[Sample]]:
        """Read one micro batch again, and its samples, and verify the checksums of its shards.

        `per_row` are the samples of each row of a packed batch. DataError: a shard has changed, or a sample is skipped.
        """
        items = []
        for position in positions:
            location = self.batches.stream.locate(position)
            where = location.manifest.where(location.shard.path)
            # The checksum of a remote shard was compared when it was fetched.
            if where not in self.verified and not location.manifest.is_remote:
                verify_shard(location.manifest.shard_path(location.shard), location.shard, verify_sha256=True)
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
            self.batches.stream,
            self.batches.planner,
            identity=self.identity,
            cursor=self.loader.cursor or self.batches.cursor.state_dict(),
            seen=Counter(self.seen_before) + self.loader.seen,
        )


def packed_rows(stream: TrainStream, *, processor: "AlignVLMProcessor", budget: int, visual_share: float = 1.0) -> int:
    """Estimate the rows of a token budget that an epoch fills, from the indexes of at most 64 shards of each source.

    `visual_share` is that of the collator.
    """
    tokens = 0.0
    for source in stream.sources:
        step = -(-len(source.shards) // _MEASURED_SHARDS)
        measured, samples = 0.0, 0
        for number in range(0, len(source.shards), step):
            chosen = source.chosen[number]
            samples += len(chosen)
            rows = list(load_index(*source.shards[number]))
            measured += sum(
                visual_share * processor.visual_tokens(rows[n].sizes) + rows[n].text_bytes // _BYTES_A_TOKEN
                for n in chosen
            )
        tokens += measured / max(samples, 1) * len(source)
    return int(tokens / budget)


def require_range(least: float, most: float = math.inf, **settings: float) -> None:
    """Raise ConfigError for the first setting outside of a range."""
    for name, value in settings.items():
        if not least <= value <= most:
            wanted = f"at least {least:g}" if most == math.inf else f"a share in [{least:g}, {most:g}]"
            raise ConfigError(f"data.init_args.{name}={value}: expected {wanted}")
