"""Shards -> raw samples: splitting, order and shuffling; the only file that reads with webdataset.

webdataset groups tar members into samples. Its own splitting and shuffling are not used: they take the rank
from the environment (so spawned workers all read everything), permute after the split and forget the epoch
in workers that restart. Here rank and worker are arguments; the order is a pure function of (seed, epoch).
"""

import hashlib
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from alignvlm_pl.errors import DataError

from .manifest import Manifest, Shard, verify_shard
from .normal_form import RawSample

GroupedSample = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStream:
    """Endless stream of raw samples, one part for each worker of each rank.

    In epoch e the shards are permuted with hash(seed, e), the same on all ranks; worker g of all G workers
    reads every G-th shard, and blocks of `shuffle_buffer` samples are permuted with hash(seed, e, first
    shard, block). Nothing else is random, so the stream can be rebuilt from (seed, epoch).

    Attributes:
        manifests: The sets, concatenated.
        seed: Seed of the order; any text, or a number.
        shuffle_buffer: Samples per shuffled block; below 2 the samples keep the order of their shard.
        rank: This process, 0 to world - 1.
        world: Number of processes.
    """

    manifests: tuple[Manifest, ...]
    seed: int | str
    shuffle_buffer: int
    rank: int = 0
    world: int = 1

    def samples(self, worker: int, num_workers: int, *, epoch: int = 0) -> Iterator[RawSample]:
        """Yield the samples of one worker for ever, from the start of an epoch.

        Raises:
            DataError: A shard is missing, cut or damaged, or there are too few shards.
        """
        check_enough_shards(self.num_shards, world=self.world, num_workers=num_workers)
        for current in count(epoch):
            yield from self.epoch_samples(worker, num_workers, epoch=current)

    def epoch_samples(self, worker: int, num_workers: int, *, epoch: int) -> Iterator[RawSample]:
        """Yield the samples of one worker in one epoch, each exactly once."""
        shards = self.epoch_shards(worker, num_workers, epoch=epoch)
        raw = (sample for manifest, shard in shards for sample in read_shard(manifest, shard))
        if self.shuffle_buffer < 2:
            yield from raw
            return
        for number in count():
            block = list(islice(raw, self.shuffle_buffer))
            if not block:
                return
            order = permutation(len(block), self.seed, epoch, shards[0][1].path, number)
            yield from (block[index] for index in order)

    def epoch_shards(self, worker: int, num_workers: int, *, epoch: int) -> list[tuple[Manifest, Shard]]:
        """List the shards one worker reads in one epoch, in order."""
        shards = [(manifest, shard) for manifest in self.manifests for shard in manifest.shards]
        order = permutation(len(shards), self.seed, epoch)
        return [
            shards[index] for index in order[self.rank * num_workers + worker :: self.world * num_workers]
        ]

    @property
    def num_shards(self) -> int:
        """Shards of all sets."""
        return sum(len(manifest.shards) for manifest in self.manifests)


def read_positions(manifest: Manifest, positions: Sequence[int]) -> Iterator[RawSample]:
    """Yield the samples at ascending positions of a set, opening only the shards that lie between them.

    Raises:
        DataError: A shard is missing, cut or damaged.
    """
    if not positions:
        return
    wanted = set(positions)
    for position, sample in enumerate(
        read_range(manifest, positions[0], positions[-1] + 1), start=positions[0]
    ):
        if position in wanted:
            yield sample


def read_range(manifest: Manifest, start: int, stop: int) -> Iterator[RawSample]:
    """Yield samples `start` to `stop` (exclusive) of a set, opening only the shards that hold them.

    Raises:
        DataError: A shard is missing, cut or damaged.
    """
    offset = 0
    for shard in manifest.shards:
        first, last = max(start - offset, 0), min(stop - offset, shard.num_samples)
        offset += shard.num_samples
        if first >= last:
            continue
        # A whole shard is read to its end, so that its count is compared with the manifest.
        whole = last == shard.num_samples
        yield from islice(read_shard(manifest, shard), first, None if whole else last)


def read_shard(manifest: Manifest, shard: Shard) -> Iterator[GroupedSample]:
    """Yield the samples of one shard: member bytes by extension, with ``__key__`` and ``__url__``.

    Raises:
        DataError: The file is missing, its size or number of samples differs from the manifest, or the tar
            does not read. A tar whose middle is damaged ends silently, hence the count.
    """
    path = manifest.shard_path(shard)
    verify_shard(path, shard)
    found = 0
    try:
        with path.open("rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                found += 1
                if found > shard.num_samples:
                    break
                yield sample
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise DataError(
            f"shard {path} is damaged after sample {found} of {shard.num_samples} ({reason}); "
            "copy it again or rebuild the set"
        ) from error
    if found != shard.num_samples:
        more = "more" if found > shard.num_samples else str(found)
        raise DataError(
            f"shard {path} is damaged: expected {shard.num_samples} samples, found {more}; "
            "copy it again or rebuild the set"
        )


def check_enough_shards(num_shards: int, *, world: int, num_workers: int) -> None:
    """Refuse fewer shards than workers: some would have nothing to read, and hang the other ranks.

    Raises:
        DataError: With both numbers and what to change.
    """
    workers = max(num_workers, 1)
    if num_shards >= world * workers:
        return
    fewer = num_shards // world
    advice = f"set num_workers to at most {fewer}, or " if fewer else ""
    raise DataError(
        f"the training sets have {num_shards} shards but {world} ranks x {workers} workers need at least "
        f"{world * workers}; {advice}write the sets again with fewer samples per shard"
    )


def permutation(size: int, *parts: int | str) -> list[int]:
    """Permute 0..size-1 as a pure function of `parts`, the same on every machine and Python version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    order = list(range(size))
    random.Random(int.from_bytes(digest, "big")).shuffle(order)
    return order


def total_samples(manifests: Sequence[Manifest], sources: frozenset[str] | None = None) -> int:
    """Count the samples of several sets, only those of `sources` where the manifests know them."""
    if sources is None:
        return sum(manifest.num_samples for manifest in manifests)
    return sum(
        sum(number for source, number in manifest.sources.items() if source in sources)
        if manifest.sources
        else manifest.num_samples
        for manifest in manifests
    )
