"""Shards -> raw samples: splitting, order and shuffling; the only file that reads with webdataset.

webdataset groups tar members into samples. Its own splitting and shuffling are not used: they take the rank
from the environment (so all spawned workers read everything), permute after the split and forget the epoch
in workers that restart. Here the stream maps a position to a sample, and an index says where in its shard it lies.
"""

import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

from alignvlm_pl.errors import DataError

from .index import SampleIndex, load_index
from .manifest import Location, Manifest, Shard
from .sample_formats import RawSample
from .tar_walk import Damage, Member, walk_range

GroupedSample = dict[str, Any]
_OPEN_SHARDS = 32
_MAX_MEMBER_BYTES = 512 * 2**20
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError)
_PICTURES = ("png", "jpg", "jpeg", "webp")


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


def read_shard(
    manifest: Manifest, shard: Shard, *, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[GroupedSample]:
    """Yield the samples of one shard in their order: member bytes by extension, with ``__key__`` and ``__url__``.

    Args:
        manifest: Of the dataset.
        shard: One of its shards.
        wanted: Tells by the name of a member whether to read it; the others have no bytes.

    Raises:
        DataError: The file is missing or damaged, or its size or number of samples differs from the manifest.
    """
    where = manifest.where(shard.path)
    found = 0
    try:
        with manifest.open_shard(shard) as stream:
            members = _require_members(walk_range(stream, shard.path, 0, shard.bytes))
            for sample in _grouped(stream, members, where, wanted):
                found += 1
                if found > shard.num_samples:
                    break
                yield sample
    except _READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"shard {where} is damaged after sample {found} of {shard.num_samples} ({_reason(error)}); "
            "copy it again or rebuild the set"
        ) from error
    if found != shard.num_samples:
        more = "more" if found > shard.num_samples else str(found)
        raise DataError(
            f"shard {where} is damaged: expected {shard.num_samples} samples, found {more}; "
            "copy it again or rebuild the set"
        )


def is_json(name: str) -> bool:
    """Whether a member is the JSON of a sample; for `read_shard`."""
    return name.rpartition(".")[2].lower() == "json"


class ShardReader:
    """Reads samples by location; keeps the shards open that it used last. One for each worker, never shared.

    A sample is read from its own bytes alone. Damage elsewhere in the shard is not noticed, and its own is never taken
    for another sample: the members must fill the bytes that the index names, and bear its key.
    """

    def __init__(self) -> None:
        self._shards: OrderedDict[str, tuple[BinaryIO, SampleIndex]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # open files do not travel to worker processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shards = OrderedDict()

    def __del__(self) -> None:
        for stream, _ in self._shards.values():
            stream.close()

    def sizes(self, location: Location) -> tuple[tuple[int, int], ...]:
        """Return (width, height) in pixels of the images of a sample, without reading it."""
        return self._open(location)[1].sizes[location.number]

    def source(self, location: Location) -> str:
        """Return the ``source`` of a sample, without reading it."""
        return self._open(location)[1].sources[location.number]

    def read(self, location: Location, *, pictures: bool = True) -> GroupedSample:
        """Return one sample: member bytes by extension, with ``__key__`` and ``__url__``.

        Args:
            location: Where it lies.
            pictures: Whether to read its images; without, they have no bytes.

        Raises:
            DataError: The shard is missing or changed, or the sample is damaged.
        """
        stream, index = self._open(location)
        where = location.manifest.where(location.shard.path)
        start, stop = index.offsets[location.number : location.number + 2]
        wanted = _is_no_picture if not pictures else lambda name: True
        found: list[GroupedSample] = []
        try:
            members = list(walk_range(stream, location.shard.path, start, stop))
            end = members.pop() if members else None
            if isinstance(end, Damage) and end.kind == "cut_at_member":  # as it is after a whole sample
                found = list(_grouped(stream, _require_members(members), where, wanted))
            reason = _other(found, end)
        except _READ_ERRORS as error:
            reason = _reason(error)
        if [sample["__key__"] for sample in found] != [index.keys[location.number]]:
            raise DataError(
                f"shard {where} is damaged at sample {location.number} of {location.shard.num_samples}, byte {start} "
                f"({reason}); copy it again or rebuild the set"
            )
        return found[0]

    def _open(self, location: Location) -> tuple[BinaryIO, SampleIndex]:
        place = location.manifest.where(location.shard.path)
        if place not in self._shards:
            index = load_index(location.manifest, location.shard)
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.popitem(last=False)[1][0].close()
            try:
                self._shards[place] = (location.manifest.open_shard(location.shard), index)
            except OSError as error:
                raise DataError(f"shard {place} cannot be read: {error.strerror}") from error
        self._shards.move_to_end(place)
        return self._shards[place]


def _require_members(walked: Iterable[Member | Damage]) -> Iterator[Member]:
    for found in walked:
        if isinstance(found, Damage):
            raise tarfile.TarError(f"byte {found.offset}: {found.message}")
        yield found


def _is_no_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() not in _PICTURES


def _grouped(
    stream: BinaryIO, members: Iterable[Member], url: str, wanted: Callable[[str], bool]
) -> Iterator[GroupedSample]:
    """Read members and group them into samples by webdataset's rule."""
    from webdataset.tariterators import group_by_keys  # here: it imports torch, which `prepare` does without

    yield from group_by_keys(_contents(stream, members, url, wanted))


def _contents(
    stream: BinaryIO, members: Iterable[Member], url: str, wanted: Callable[[str], bool]
) -> Iterator[dict[str, Any]]:
    """Read members for webdataset to group."""
    for member in members:
        if not _is_ours(member.name):
            continue
        stream.seek(member.data_offset)
        # A member of any size may stand in a shard from elsewhere; what is cut here does not decode, and is counted.
        data = stream.read(min(member.size, _MAX_MEMBER_BYTES)) if wanted(member.name) else b""
        yield {"fname": member.name, "data": data, "__url__": url}


def _other(found: Sequence[GroupedSample], end: Member | Damage | None) -> str:
    """Say what stands in the place of a sample."""
    if found:
        return f"found {', '.join(sample['__key__'] for sample in found)} in its place"
    if isinstance(end, Damage):
        return f"byte {end.offset}: {end.message}"
    return f"nothing but zeros after {end.name}" if end else "nothing but zeros in its place"


def _is_ours(name: str) -> bool:
    """Whether a member may be part of a sample: fields in double underscores are webdataset's own."""
    return "__" not in name.rpartition("/")[2].partition(".")[2][:2]


def _reason(error: BaseException) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
