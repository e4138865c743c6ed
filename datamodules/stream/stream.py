"""The training stream: position -> sample, over one or several sources (no torch here)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from alignvlm_pl.errors import DataError

from ..shards.index import load_index
from ..shards.manifest import Location, Manifest, Shard
from .order import Mixture, SetOrder


@dataclass(frozen=True, kw_only=True)
class Source:
    """Sets that are trained on together.

    Attributes:
        name: Name in the config.
        manifests: The sets, concatenated.
        weight: Share of the samples in a mixture.
        only: Take only samples whose ``source`` is one of these; None takes all.
    """

    name: str
    manifests: tuple[Manifest, ...]
    weight: float = 1.0
    only: frozenset[str] | None = None

    @cached_property
    def shards(self) -> list[tuple[Manifest, Shard]]:
        """All shards of all sets."""
        return [(manifest, shard) for manifest in self.manifests for shard in manifest.shards]

    @cached_property
    def chosen(self) -> list[Sequence[int]]:
        """The samples of each shard that are taken.

        Raises:
            DataError: An index is missing, or no sample is left.
        """
        if self.only is None:
            return [range(shard.num_samples) for _, shard in self.shards]
        found: list[Sequence[int]] = []
        for manifest, shard in self.shards:
            sources = load_index(manifest, shard).sources
            found.append([number for number, source in enumerate(sources) if source in self.only])
        if not any(found):
            raise DataError(
                f"data.init_args.sources: no sample of {', '.join(sorted(self.only))} in the training sets of "
                f"{self.name}"
            )
        return found

    def __len__(self) -> int:
        return sum(len(numbers) for numbers in self.chosen)


@dataclass(frozen=True, kw_only=True)
class TrainStream:
    """Endless stream of the samples of all sources: a pure function of the position.

    One source, or several without weights: each epoch has each sample once, in another order. Several with weights:
    every source goes through epochs of its own, as fast as its weight says.

    Attributes:
        sources: What is trained on.
        seed: Seed of the order.
        buffer: See `SetOrder`.
    """

    sources: tuple[Source, ...]
    seed: str
    buffer: int
    orders: list[SetOrder] = field(init=False, repr=False, compare=False)
    mixture: Mixture | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        orders = [
            # Each source has its own seed: two copies of one set must not come in step.
            SetOrder(
                [len(numbers) for numbers in source.chosen], seed=f"{self.seed}/{number}", buffer=self.buffer
            )
            for number, source in enumerate(self.sources)
        ]
        weights = [source.weight for source in self.sources]
        object.__setattr__(self, "orders", orders)
        object.__setattr__(self, "mixture", Mixture(weights, seed=self.seed) if len(weights) > 1 else None)

    def __len__(self) -> int:
        """Samples of an epoch: of all sources together."""
        return sum(map(len, self.orders))

    def locate(self, position: int) -> Location:
        """Return where the sample at a position lies, 0 and up."""
        number, inner = self.mixture.place(position) if self.mixture else (0, position)
        source = self.sources[number]
        shard, sample = self.orders[number].place(inner)
        manifest, found = source.shards[shard]
        return Location(manifest=manifest, shard=found, number=source.chosen[shard][sample])

    def progress(self, position: int) -> dict[str, dict[str, int]]:
        """Return epoch and position in it of every source before a position of the stream."""
        counts = self.mixture.positions(position) if self.mixture else [position]
        found = {}
        for source, order, done in zip(self.sources, self.orders, counts, strict=True):
            epoch, at = divmod(done, len(order))
            found[source.name] = {"epoch": epoch, "position": at}
        return found
