"""Sample index of a shard, `name-00000.index.json` beside `name-00000.tar` (no torch here).

With it a reader seeks to any sample, and counts tiles and estimates tokens without opening an image.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import atomic_path

from ..storage.transfer import MissingFileError
from .manifest import Manifest, Shard
from .sample import message_text

INDEX_VERSION = 1
_REMEDY = "`prepare index FOLDER` writes it"


class MissingIndexError(DataError):
    """A shard has no index beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRow:
    """One sample in the index; the fields are the columns of `SampleIndex`."""

    offset: int
    key: str
    sizes: tuple[tuple[int, int], ...] = ()
    text_bytes: int = 0
    source: str = ""
    supervised_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleIndex:
    """The samples of one shard, in their order; n of them.

    Attributes:
        offsets: (n + 1) bytes of the shard: where the first header of each sample begins, a header that only
            carries a long name included; last the end of the last sample's data, padded to whole blocks.
        keys: (n) names of the samples.
        sizes: (n) upright (width, height) in pixels of each image of the sample; empty for text alone.
        text_bytes: (n) UTF-8 bytes of all text of the messages; of a caption pair, of the caption.
        sources: (n) sources of the samples.
        supervised_bytes: (n) UTF-8 bytes of the assistant's turns; 0: nothing is supervised.
    """

    offsets: tuple[int, ...]
    keys: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], ...], ...]
    text_bytes: tuple[int, ...]
    sources: tuple[str, ...]
    supervised_bytes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_rows(cls, rows: Sequence[IndexRow], *, end: int) -> "SampleIndex":
        """Build the index of a shard whose last sample ends at byte `end`."""
        return cls(
            offsets=(*(row.offset for row in rows), end),
            keys=tuple(row.key for row in rows),
            sizes=tuple(row.sizes for row in rows),
            text_bytes=tuple(row.text_bytes for row in rows),
            sources=tuple(row.source for row in rows),
            supervised_bytes=tuple(row.supervised_bytes for row in rows),
        )


def index_path(shard: Path) -> Path:
    """Return the path of the index of a shard."""
    return shard.with_suffix(".index.json")


def index_row(
    record: Mapping[str, Any], *, offset: int, key: str, sizes: Iterable[tuple[int, int]], source: str
) -> IndexRow:
    """Return the row of a record that `check_record` has passed; `source` is used where the record names none."""
    texts = [(turn["role"], len(message_text(turn).encode())) for turn in record["messages"]]
    return IndexRow(
        offset=offset,
        key=key,
        sizes=tuple(sizes),
        text_bytes=sum(size for _, size in texts),
        source=str(record.get("source") or source),
        supervised_bytes=sum(size for role, size in texts if role == "assistant"),
    )


def write_index(path: Path, index: SampleIndex) -> str:
    """Write an index to its path, complete or not at all, and return the sha256 of the file."""
    names = {name: number for number, name in enumerate(sorted(set(index.sources)))}
    record = {
        "version": INDEX_VERSION,
        **{column.name: getattr(index, column.name) for column in fields(index)},
        "sources": {"names": list(names), "of": [names[source] for source in index.sources]},
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
    data = text.encode("utf-8", "surrogatepass")  # as json.loads reads it
    with atomic_path(path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_index(manifest: Manifest, shard: Shard) -> SampleIndex:
    """Read the index of a shard and compare it with the manifest.

    Raises:
        MissingIndexError: There is none.
        DataError: It is malformed, not the one of the manifest, or does not fit the shard.
    """
    path: Path | str = manifest.where(index_path(Path(shard.path)).name)
    try:
        path = manifest.index_path(shard)
        data = path.read_bytes()
    except (OSError, MissingFileError) as error:
        raise MissingIndexError(f"there is no sample index {path} ({error}); {_REMEDY}") from error
    if shard.index_sha256 and (found := hashlib.sha256(data).hexdigest()) != shard.index_sha256:
        raise DataError(
            f"sample index {path}: expected sha256 {shard.index_sha256[:16]}…, found {found[:16]}…; {_REMEDY}"
        )
    index = _parse(data, path)
    if len(index) != shard.num_samples:
        raise DataError(
            f"sample index {path}: expected {shard.num_samples} samples as in the manifest, found {len(index)}; "
            f"{_REMEDY}"
        )
    if index.offsets[-1] > shard.bytes:
        raise DataError(
            f"sample index {path}: its last sample ends at byte {index.offsets[-1]}, expected at most the "
            f"{shard.bytes} bytes of the shard; {_REMEDY}"
        )
    return index


def _parse(data: bytes, path: Path | str) -> SampleIndex:
    try:
        record = json.loads(data)
        version, names = record["version"], record["sources"]["names"]
        index = SampleIndex(
            offsets=_whole_numbers(record["offsets"]),
            keys=tuple(str(key) for key in record["keys"]),
            sizes=tuple(tuple((int(w), int(h)) for w, h in images) for images in record["sizes"]),
            text_bytes=_whole_numbers(record["text_bytes"]),
            sources=tuple(names[number] for number in _whole_numbers(record["sources"]["of"])),
            supervised_bytes=_whole_numbers(record["supervised_bytes"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"sample index {path} is malformed ({error!r:.200}); {_REMEDY}") from error
    if version != INDEX_VERSION:
        raise DataError(f"sample index {path}: expected version {INDEX_VERSION}, found {version}; {_REMEDY}")
    lengths = {column.name: len(getattr(index, column.name)) for column in fields(index) if column.name != "offsets"}
    if set(lengths.values()) != {len(index.offsets) - 1}:
        raise DataError(
            f"sample index {path}: expected {len(index.offsets) - 1} entries in every column, found {lengths}; "
            f"{_REMEDY}"
        )
    if any(after <= before for before, after in pairwise(index.offsets)):
        raise DataError(f"sample index {path}: expected offsets that ascend; {_REMEDY}")
    return index


def _whole_numbers(column: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in column):
        raise TypeError("a column does not hold whole numbers only")
    return tuple(column)
