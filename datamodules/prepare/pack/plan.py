"""Second pass: shuffle the samples and cut them into shards, with at most about 60 bytes per sample in memory."""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from alignvlm_pl.errors import DataError

from .spool import SpoolFiles
from .work_folder import write_array

PLACE = np.dtype([("part", "<u4"), ("length", "<u4"), ("offset", "<u8")])
"""Location of a sample: number of its part, length and offset of its record in the spool file."""
_END_MARK = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
"""Most bytes of the end mark that tarfile writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The order of all samples, cut into shards.

    Attributes:
        path: File of the array of `PLACE`, in the order of the shards.
        cuts: Positions at which shards begin, and the number of samples at the end.
        bytes: Approximate bytes of each shard.
        identity: Checksum of order, places and cuts.
    """

    path: Path
    cuts: tuple[int, ...]
    bytes: tuple[int, ...]
    identity: str

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.cuts) - 1


def make_plan(spool: Path, numbers: Sequence[int], out: Path, *, samples_per_shard: int, shard_bytes: int) -> Plan:
    """Shuffle the samples of all parts and cut them into shards.

    Args:
        spool: Folder of the spool files.
        numbers: The parts.
        out: File for the order.
        samples_per_shard: Samples after which a new shard begins.
        shard_bytes: Bytes that no shard exceeds, unless by a single sample.

    Raises:
        DataError: There is no sample.
    """
    files = [SpoolFiles(folder=spool, number=number) for number in numbers]
    counts = [len(np.load(file.rows, mmap_mode="r", allow_pickle=False)) for file in files]
    total = sum(counts)
    if not total:
        raise DataError(f"{spool} holds no sample; an empty dataset cannot be read")
    order, size, places = np.empty(total, "<u8"), np.empty(total, "<u4"), np.empty(total, PLACE)
    at = 0
    for file, count in zip(files, counts, strict=True):
        rows = np.load(file.rows, allow_pickle=False)
        here = slice(at, at + count)
        order[here], size[here] = rows["order"], rows["size"]
        places["part"][here] = file.number
        places["length"][here], places["offset"][here] = rows["length"], rows["offset"]
        at += count
    # Stable: samples of equal hash keep the order of the parts and rows.
    permutation = np.argsort(order, kind="stable")
    del order
    places, size = places[permutation], size[permutation]
    del permutation
    ends = np.cumsum(size, dtype="<u8")
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


def load_image_checksums(spool: Path, numbers: Sequence[int]) -> np.ndarray:
    """Return the checksums of the images of all parts."""
    return np.concatenate([np.load(SpoolFiles(folder=spool, number=n).images, allow_pickle=False) for n in numbers])


def load_ids(spool: Path, numbers: Sequence[int]) -> np.ndarray:
    """Return the hashes of the ids of all samples, in the order of parts and rows; 0 = no id."""
    loaded = (np.load(SpoolFiles(folder=spool, number=n).rows, allow_pickle=False) for n in numbers)
    return np.concatenate([rows["id"] for rows in loaded])


def repeated_positions(ids: np.ndarray) -> np.ndarray:
    """Return the sorted indexes of `ids` whose value an earlier one has, except 0."""
    order = np.argsort(ids, kind="stable")
    again = (ids[order[1:]] == ids[order[:-1]]) & (ids[order[1:]] != 0)
    return np.sort(order[1:][again])
