"""The order of training samples: pure functions of (seed, position), the same on every rank and machine.

Nothing here reads data or keeps a random state: whoever knows a position knows the sample, so a run can go on anywhere,
on any number of ranks and workers.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, count, pairwise
from typing import NamedTuple

from alignvlm_pl.errors import ConfigError

BLOCK = 64
"""Neighbouring samples of a shard that stay in one block: they are read together, wherever the block comes to stand."""
SLOTS = 1024
"""Positions of a mixture over which its weights are kept exactly."""
_SCALE = 1 << 32


class _Block(NamedTuple):
    """Samples `start` to `stop` of one shard."""

    shard: int
    start: int
    stop: int


class SetOrder:
    """Endless order of the samples of some shards, epoch after epoch.

    In epoch e the blocks of all shards are permuted with hash(seed, e), and the samples of as many successive blocks as
    make up `buffer` with hash(seed, e, group). It takes the place of a shuffle buffer, whose content would be a state.

    Args:
        sizes: Samples of each shard.
        seed: Seed of the order.
        buffer: Samples that are permuted together; below 2 only the shards are permuted.
    """

    def __init__(self, sizes: Sequence[int], *, seed: str, buffer: int) -> None:
        self.sizes = tuple(sizes)
        self.seed = seed
        self.buffer = buffer
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._group = lru_cache(maxsize=16)(self._make_group)

    def __getstate__(self) -> dict[str, object]:
        return {"sizes": self.sizes, "seed": self.seed, "buffer": self.buffer}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["sizes"], seed=state["seed"], buffer=state["buffer"])  # type: ignore[misc]

    def __len__(self) -> int:
        return sum(self.sizes)

    def place(self, position: int) -> tuple[int, int]:
        """Return shard and sample in it of a position, 0 and up; epoch e begins at e x len(self)."""
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
        """Blocks of a group, where each begins in it, and the order of its samples; empty where it is as it is."""
        blocks = self._epoch(epoch)[0][number]
        starts = [0, *accumulate(block.stop - block.start for block in blocks)]
        order = permutation(starts[-1], self.seed, epoch, "group", number) if self.buffer > 1 else []
        return blocks, starts[:-1], order


class Mixture:
    """Which source gives the sample at each position, and the how manieth of that source it is.

    Of any number of blocks of `SLOTS` positions each source has its share, to within one sample; where its samples
    stand among the others is permuted with hash(seed, block). The position of a source follows from that of the
    mixture, so there is no state of its own to keep.

    Args:
        weights: Source -> share of the samples; they need not sum to 1.
        seed: Seed of the order.

    Raises:
        ConfigError: A weight is too small to be kept, or not positive.
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

    def __getstate__(self) -> dict[str, object]:
        return {"weights": self.weights, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["weights"], seed=state["seed"])  # type: ignore[misc]

    def place(self, position: int) -> tuple[int, int]:
        """Return number and position of the source that a position of the mixture belongs to."""
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
