"""Second pass: shuffle the samples and cut them into shards, with at most about 75 bytes per sample in memory."""

import hashlib
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .work_folder import write_array

PLACE = np.dtype([("part", "<u4"), ("length", "<u4"), ("offset", "<u8")])
"""Location of a sample: number of its part, length and offset of its record in the spool file."""
_END_MARK = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
"""Most bytes of the end mark that tarfile writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The order of all samples, cut into shards."""

    path: Path  # file of the array of `PLACE`, in the order of the shards
    cuts: tuple[int, ...]  # positions at which shards begin, and the number of samples at the end
    bytes: tuple[int, ...]  # approximate bytes of each shard
    identity: str  # checksum of order, places and cuts


def make_plan(rows: np.ndarray, out: Path, *, samples_per_shard: int, shard_bytes: int) -> Plan:
    """Shuffle samples, an array of `spool.ROW`, and cut them into shards; the order is written to the file `out`.

    A shard has at most so many samples and bytes, or is a single sample.
    """
    # Stable: samples of equal hash keep the order of the parts and rows.
    permutation = np.argsort(rows["order"], kind="stable")
    ends = np.cumsum(rows["size"][permutation], dtype="<u8")
    places = np.empty(len(rows), PLACE)
    for name in PLACE.names or ():
        places[name] = rows[name][permutation]
    cuts = _cut(ends, samples_per_shard, shard_bytes)
    digest = hashlib.blake2b(places.view(np.uint8).data, digest_size=16)
    digest.update(repr(cuts).encode())
    write_array(out, places)
    limits = [0, *(int(ends[cut - 1]) for cut in cuts[1:])]
    sizes = tuple(after - before + _END_MARK for before, after in pairwise(limits))
    return Plan(path=out, cuts=cuts, bytes=sizes, identity=digest.hexdigest())


def _cut(ends: np.ndarray, samples_per_shard: int, shard_bytes: int) -> tuple[int, ...]:
    """Return the cuts of shards filled in order; `ends` are cumulative bytes at the end of each sample."""
    cuts = [0]
    while (start := cuts[-1]) < len(ends):
        before = int(ends[start - 1]) if start else 0
        limit = before + max(shard_bytes - _END_MARK, 0)
        fitting = int(np.searchsorted(ends, np.uint64(limit), side="right"))
        cuts.append(min(start + samples_per_shard, max(fitting, start + 1), len(ends)))
    return tuple(cuts)


def repeated_positions(ids: np.ndarray) -> np.ndarray:
    """Return the sorted indexes of `ids` whose value an earlier one has, except 0."""
    order = np.argsort(ids, kind="stable")
    again = (ids[order[1:]] == ids[order[:-1]]) & (ids[order[1:]] != 0)
    return np.sort(order[1:][again])
