"""Shards -> raw samples, by location; members are grouped into samples by webdataset.

Its splitting and shuffling are not used: `datamodules.stream` maps a position to a sample, on any rank and worker.
"""

import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import EvalSample

from ..storage.file_kinds import IMAGE_ENDINGS
from .index import IndexRow, SampleIndex, load_index
from .manifest import Location, Manifest, load_manifest
from .sample import last_question, references
from .sample_formats import parse_record
from .tar_walk import Damage, Member, require_members, sample_members, walk_range

GroupedSample = dict[str, Any]
_OPEN_SHARDS = 32
_MAX_MEMBER_BYTES = 512 * 2**20
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError)


def read_range(
    manifest: Manifest, start: int = 0, stop: int | None = None, *, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[GroupedSample]:
    """Yield samples `start` to `stop` (exclusive; None: to the last) of a dataset, as `ShardReader.read`."""
    reader, stop = ShardReader(), manifest.num_samples if stop is None else stop
    for shard in manifest.shards:
        for number in range(max(start, 0), min(stop, shard.num_samples)):
            yield reader.read(Location(manifest=manifest, shard=shard, number=number), wanted=wanted)
        start, stop = start - shard.num_samples, stop - shard.num_samples


def read_answers(folder: Path | str) -> list[EvalSample]:
    """Read the samples of a dataset without images, with empty predictions; DataError: one is not in the schema."""
    answers = []
    for raw in read_range(load_manifest(folder), wanted=is_json):
        name = f"{raw['__key__']}.json"
        try:
            answers.append(_answer(raw["__key__"], parse_record(raw.get("json", b""), where=name)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{raw['__url__']}: {name} is not in the sample schema ({error})") from error
    return answers


def _answer(key: str, record: dict) -> EvalSample:
    given, meta = record.get("references", []), record.get("meta") or {}
    if not isinstance(given, list) or not isinstance(meta, dict):
        raise TypeError(f"references must be a list and meta an object, found {given!r:.60}, {meta!r:.60}")
    gold, question = tuple(references(record)), last_question(record["messages"])
    return EvalSample(key=key, prediction="", references=gold, question=question, meta=meta)


def is_json(name: str) -> bool:
    """Whether a member is the JSON of a sample; for `ShardReader.read`."""
    return _extension(name) == "json"


def is_image(name: str) -> bool:
    """Whether a member is an image by its ending; for `ShardReader.read`."""
    return _extension(name) in IMAGE_ENDINGS


def is_no_image(name: str) -> bool:
    """Whether a member is no image by its ending; for `ShardReader.read`."""
    return not is_image(name)


class ShardReader:
    """Read samples by location; the shards used last stay open. One for each worker.

    A sample is read from its own bytes alone: its members must fill the bytes of the index and have its key. Damage
    elsewhere in the shard is not noticed.
    """

    def __init__(self) -> None:
        self._shards: OrderedDict[str, tuple[BinaryIO, SampleIndex]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, ()  # open files do not travel to worker processes

    def __del__(self) -> None:
        for stream, _ in self._shards.values():
            stream.close()

    def row(self, location: Location) -> IndexRow:
        """Return what the index has of a sample, without reading that."""
        return self._open(location)[1][location.number]

    def read(self, location: Location, *, wanted: Callable[[str], bool] = lambda name: True) -> GroupedSample:
        """Return one sample: member bytes by extension, with ``__key__`` and ``__url__``.

        `wanted` says by its name whether a member is read; the others are empty. DataError: the shard is missing, has
        no index, or is damaged there.
        """
        stream, index = self._open(location)
        where = location.manifest.where(location.shard.path)
        start, stop = index.extent(location.number)
        found: list[GroupedSample] = []
        try:
            members = list(walk_range(stream, location.shard.path, start, stop))
            end = members.pop() if members else None
            if isinstance(end, Damage) and end.kind == "cut_at_member":  # as it is after a whole sample
                found = list(_grouped(stream, require_members(members, _tar_error), where, wanted))
            reason = _found_instead(found, end)
        except _READ_ERRORS as error:
            reason = _reason(error)
        if [sample["__key__"] for sample in found] != [index[location.number].key]:
            raise DataError(
                f"shard {where} is damaged at sample {location.number} of {location.shard.num_samples}, byte {start} "
                f"({reason}); copy it again or rebuild the dataset"
            )
        return found[0]

    def _open(self, location: Location) -> tuple[BinaryIO, SampleIndex]:
        where = location.manifest.where(location.shard.path)
        if where not in self._shards:
            index = load_index(location.manifest, location.shard)
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.popitem(last=False)[1][0].close()
            try:
                self._shards[where] = (location.manifest.open_shard(location.shard), index)
            except OSError as error:
                raise DataError(f"shard {where} cannot be read: {error.strerror}") from error
        self._shards.move_to_end(where)
        return self._shards[where]


def _tar_error(damage: Damage) -> tarfile.TarError:
    return tarfile.TarError(f"byte {damage.offset}: {damage.message}")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _grouped(
    stream: BinaryIO, members: Iterable[Member], url: str, wanted: Callable[[str], bool]
) -> Iterator[GroupedSample]:
    """Read members and group them into samples by webdataset's rule."""
    from webdataset.tariterators import group_by_keys  # here: it imports torch, which `prepare` does without

    def read(member: Member) -> dict[str, Any]:
        stream.seek(member.data_offset)
        # A shard made elsewhere may hold a member of any size; what is cut here does not decode, and is skipped.
        data = stream.read(min(member.size, _MAX_MEMBER_BYTES)) if wanted(member.name) else b""
        return {"fname": member.name, "data": data, "__url__": url}

    # Fields that begin with two underscores are webdataset's.
    found = sample_members(members)
    fields = (member for member in found if "__" not in member.name.rpartition("/")[2].partition(".")[2][:2])
    yield from group_by_keys(map(read, fields))


def _found_instead(found: Sequence[GroupedSample], end: Member | Damage | None) -> str:
    """Describe what the bytes of a sample hold."""
    if found:
        return f"found {', '.join(sample['__key__'] for sample in found)} in its place"
    if isinstance(end, Damage):
        return f"byte {end.offset}: {end.message}"
    return f"nothing but zeros after {end.name}" if end else "nothing but zeros in its place"


def _reason(error: BaseException) -> str:
    return str(error.args[0]) if error.args else type(error).__name__
