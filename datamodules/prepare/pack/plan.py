"""Second pass: shuffle the samples and cut them into shards, with at most about 90 bytes per sample in memory."""

import hashlib
import tarfile
from typing import NamedTuple

import numpy as np

PLACE = np.dtype([("tar", "<u4"), ("size", "<u4"), ("offset", "<u8")])
"""Place of a sample after the first pass: number of its tar, bytes and offset in it."""
_END_MARK = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
"""Most bytes of the end mark that tarfile writes."""


class PlannedShard(NamedTuple):
    """A shard to be written: position of its first sample, array of `PLACE` of all, and about its size in bytes."""

    number: int
    start: int
    places: np.ndarray
    bytes: int

    @property
    def identity(self) -> str:
        """Checksum of positions and places."""
        return hashlib.blake2b(b"%d " % self.start + self.places.tobytes(), digest_size=16).hexdigest()


def make_plan(rows: np.ndarray, *, samples_per_shard: int, shard_bytes: int) -> list[PlannedShard]:
    """Shuffle samples, an array of `spool.ROW`, and cut them into shards.

    A shard has at most so many samples and bytes, or is a single sample.
    """
    # Stable: samples of equal hash keep the order of the rows.
    permutation = np.argsort(rows["order"], kind="stable")
    ends = np.cumsum(rows["size"][permutation], dtype="<u8")
    places = np.empty(len(rows), PLACE)
    for name in PLACE.names or ():
        places[name] = rows[name][permutation]
    plan: list[PlannedShard] = []
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        limit = before + max(shard_bytes - _END_MARK, 0)
        fitting = int(np.searchsorted(ends, np.uint64(limit), side="right"))
        end = min(start + samples_per_shard, max(fitting, start + 1), len(ends))
        size = int(ends[end - 1]) - before + _END_MARK
        plan.append(PlannedShard(len(plan), start, places[start:end], size))
        start = end
    return plan


def repeated_positions(ids: np.ndarray) -> np.ndarray:
    """Return the sorted indexes of `ids` whose value an earlier one has, except 0."""
    order = np.argsort(ids, kind="stable")
    again = (ids[order[1:]] == ids[order[:-1]]) & (ids[order[1:]] != 0)
    return np.sort(order[1:][again])
