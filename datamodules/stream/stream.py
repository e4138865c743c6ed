"""The training stream: position -> sample, over one or several sources (no torch here).

The order is a pure function of seed and position, the same on every rank and machine. Nothing keeps a random state, so
a run can resume at any position, on any number of ranks and workers.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple

from alignvlm_pl.errors import ConfigError, DataError

from ..shards.index import load_index
from ..shards.manifest import Location, Manifest, Shard

BLOCK = 64
"""Neighbouring samples of a shard that stay in one block, so that they are read together."""
SLOTS = 1024
"""Positions of a mixture in which each source has exactly its share."""
_SCALE = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Source:
    """Datasets that are trained on together, under a name of the config.

    `weight` is their share of the samples in a mixture. Of `only`, those ``source``s are used; None: all.
    """

    name: str
    manifests: tuple[Manifest, ...]
    weight: float = 1.0
    only: frozenset[str] | None = None

    @cached_property
    def shards(self) -> list[tuple[Manifest, Shard]]:
        """All shards of all datasets."""
        return [(manifest, shard) for manifest in self.manifests for shard in manifest.shards]

    @cached_property
    def chosen(self) -> list[Sequence[int]]:
        """Indices of the samples of each shard that are used; DataError: an index is missing, or none is left."""
        if self.only is None:
            return [range(shard.num_samples) for _, shard in self.shards]
        found: list[Sequence[int]] = [load_index(*shard).of_sources(self.only) for shard in self.shards]
        if not any(found):
            raise DataError(
                f"data.init_args.sources: no sample of {', '.join(sorted(self.only))} in the training datasets of "
                f"{self.name}"
            )
        return found

    def __len__(self) -> int:
        return sum(len(numbers) for numbers in self.chosen)


@dataclass(frozen=True, kw_only=True)
class TrainStream:
    """Endless stream of the samples of all sources: a pure function of seed and position.

    Of one source, each epoch has each sample once, in another order. Of several, each source has its own epochs, and
    its share of the positions is its weight. For `buffer` see `DatasetOrder`.
    """

    sources: tuple[Source, ...]
    seed: str
    buffer: int
    orders: "list[DatasetOrder]" = field(init=False, repr=False, compare=False)
    mixture: "Mixture | None" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        orders = [
            # Each source has its own seed: two copies of one dataset must not be in the same order.
            DatasetOrder([len(numbers) for numbers in source.chosen], seed=f"{self.seed}/{number}", buffer=self.buffer)
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
        number, inner = self.mixture.locate(position) if self.mixture else (0, position)
        source = self.sources[number]
        shard, sample = self.orders[number].locate(inner)
        manifest, found = source.shards[shard]
        return Location(manifest=manifest, shard=found, number=source.chosen[shard][sample])

    def progress(self, position: int) -> dict[str, dict[str, int]]:
        """Return epoch and position in it of every source before a position of the stream."""
        counts = self.mixture.positions(position) if self.mixture else [position]
        return {
            source.name: {"epoch": done // len(order), "position": done % len(order)}
            for source, order, done in zip(self.sources, self.orders, counts, strict=True)
        }


class _Block(NamedTuple):
    """Samples `start` to `stop` of one shard."""

    shard: int
    start: int
    stop: int


class DatasetOrder:
    """Endless order of the samples of some shards, by their numbers of samples, epoch after epoch.

    In epoch e the blocks of all shards are permuted with hash(seed, e), and the samples of as many successive blocks as
    fill `buffer` with hash(seed, e, group); below 2 only the shards are permuted. Unlike a shuffle buffer it has no
    content to keep in a checkpoint.
    """

    def __init__(self, sizes: Sequence[int], *, seed: str, buffer: int) -> None:
        self.sizes = tuple(sizes)
        self.seed = seed
        self.buffer = buffer
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=16)(self._make_group)

    def __reduce__(self) -> tuple[Any, ...]:  # without the caches
        return partial(DatasetOrder, seed=self.seed, buffer=self.buffer), (self.sizes,)

    def __len__(self) -> int:
        return sum(self.sizes)

    def locate(self, position: int) -> tuple[int, int]:
        """Map a position, 0 and up, to (shard, sample in the shard); epoch e begins at e x len(self)."""
        epoch, at = divmod(position, len(self))
        _, ends = self._epoch(epoch)
        number = bisect_right(ends, at)
        blocks, starts, order = self._group(epoch, number)
        inner = at - (ends[number - 1] if number else 0)
        inner = order[inner] if order else inner
        block = bisect_right(starts, inner) - 1
        return blocks[block].shard, blocks[block].start + inner - starts[block]

    def _make_epoch(self, epoch: int) -> tuple[list[list[_Block]], list[int]]:
        """Groups of blocks in the order of an epoch, and the positions where they end."""
        step = min(BLOCK, self.buffer) if self.buffer > 1 else max(self.sizes, default=1)
        blocks = [
            _Block(shard, start, min(start + step, size))
            for shard, size in enumerate(self.sizes)
            for start in range(0, size, step)
        ]
        blocks = [blocks[index] for index in permutation(len(blocks), self.seed, epoch)]
        groups: list[list[_Block]] = []
        room = 0
        for block in blocks:
            if room <= 0:
                groups.append([])
                room = max(self.buffer, 1)
            groups[-1].append(block)
            room -= block.stop - block.start
        return groups, list(accumulate(sum(b.stop - b.start for b in group) for group in groups))

    def _make_group(self, epoch: int, number: int) -> tuple[list[_Block], list[int], list[int]]:
        """Return the blocks of a group, where each begins in it, and its permutation; empty if it is not permuted."""
        blocks = self._epoch(epoch)[0][number]
        starts = [0, *accumulate(block.stop - block.start for block in blocks)]
        order = permutation(starts[-1], self.seed, epoch, "group", number) if self.buffer > 1 else []
        return blocks, starts[:-1], order


class Mixture:
    """Map a stream position to (source, position within the source), by the weight of each source.

    In any number of blocks of `SLOTS` positions each source has its share, to within one sample; the order within a
    block is permuted with hash(seed, block). The position within a source follows from the stream position, so a
    checkpoint needs no state of the mixture. Weights need not sum to 1; one that is not positive, or too small to be
    kept, is a ConfigError.
    """

    def __init__(self, weights: Sequence[float], *, seed: str) -> None:
        total = sum(weights)
        if not min(weights) > 0 or not min(weights) / total * SLOTS >= 1:
            listing = ", ".join(f"{weight:g}" for weight in weights)
            raise ConfigError(
                f"data.init_args.mixture: weights {listing}: expected positive ones, each at least one {SLOTS}th of "
                "their sum"
            )
        self.weights = tuple(weights)
        self.seed = seed
        self._bounds = [0, *(round(part / total * _SCALE) for part in accumulate(weights))]
        self._bounds[-1] = _SCALE
        self._block = lru_cache(maxsize=16)(self._make_block)

    def __reduce__(self) -> tuple[Any, ...]:  # without the cache
        return partial(Mixture, seed=self.seed), (self.weights,)

    def locate(self, position: int) -> tuple[int, int]:
        """Map a stream position to (source, position within the source)."""
        block, slot = divmod(position, SLOTS)
        return self._block(block)[slot]

    def positions(self, position: int) -> list[int]:
        """Return how many samples of each source lie before a position."""
        block, slot = divmod(position, SLOTS)
        found = self._starts(block)
        for source, _ in self._block(block)[:slot]:
            found[source] += 1
        return found

    def _starts(self, block: int) -> list[int]:
        """Samples of each source before a block: the cumulative weights, rounded down, so that they sum exactly."""
        edges = [bound * SLOTS * block // _SCALE for bound in self._bounds]
        return [after - before for before, after in pairwise(edges)]

    def _make_block(self, block: int) -> list[tuple[int, int]]:
        starts, ends = self._starts(block), self._starts(block + 1)
        slots = [source for source in range(len(starts)) for _ in range(ends[source] - starts[source])]
        counters = [count(start) for start in starts]
        order = permutation(len(slots), self.seed, "mixture", block)
        return [(slots[index], next(counters[slots[index]])) for index in order]


def permutation(size: int, *parts: int | str) -> list[int]:
    """Permute 0..size-1 as a pure function of `parts`, the same on every machine and Python version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    order = list(range(size))
    random.Random(int.from_bytes(digest, "big")).shuffle(order)
    return order
