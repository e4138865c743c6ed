"""The index beside a shard: where each sample begins, and what a batch planner must know of it (no torch here).

`name-00000.index.json` lies beside `name-00000.tar`. With it a reader can seek to any sample, and count tiles and
estimate tokens without opening an image. Equal shards have equal bytes of index.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
_COLUMNS = ("keys", "sizes", "text_bytes", "supervised_bytes")


class MissingIndexError(DataError):
    """A shard has no index beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRow:
    """What the index says about one sample; the fields are the columns of `SampleIndex`."""

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
        sources: (n) data sets the samples come from.
        supervised_bytes: (n) UTF-8 bytes of the assistant's turns; 0 = there is nothing to learn.
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
    def of_rows(cls, rows: Sequence[IndexRow], *, end: int) -> "SampleIndex":
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
    """Return where the index of a shard lies."""
    return shard.with_suffix(".index.json")


def index_row(
    record: Mapping[str, Any], *, offset: int, key: str, sizes: Iterable[tuple[int, int]], source: str
) -> IndexRow:
    """Measure one sample in the sample schema.

    Args:
        record: Its JSON, which `check_record` has passed.
        offset: Byte of the shard at which it begins.
        key: Its name in the shard.
        sizes: Upright (width, height) in pixels of its images, in order.
        source: Its source where the record names none.
    """
    texts = [(turn["role"], len(message_text(turn).encode())) for turn in record["messages"]]
    return IndexRow(
        offset=offset,
        key=key,
        sizes=tuple(sizes),
        text_bytes=sum(size for _, size in texts),
        source=str(record.get("source") or source),
        supervised_bytes=sum(size for role, size in texts if role == "assistant"),
    )


def to_bytes(index: SampleIndex) -> bytes:
    """Return the content of the file of an index."""
    names = sorted(set(index.sources))
    number = {name: position for position, name in enumerate(names)}
    record = {
        "version": INDEX_VERSION,
        "offsets": index.offsets,
        "keys": index.keys,
        "sizes": index.sizes,
        "text_bytes": index.text_bytes,
        "sources": {"names": names, "of": [number[source] for source in index.sources]},
        "supervised_bytes": index.supervised_bytes,
    }
    return (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode(
        "utf-8",
        "surrogatepass",  # as json.loads reads it
    )


def write_index(path: Path, index: SampleIndex) -> str:
    """Write the index of a shard, complete or not at all.

    Args:
        path: Its own path, not the shard's (`index_path`).
        index: The samples.

    Returns:
        The sha256 of the file.
    """
    data = to_bytes(index)
    with atomic_path(path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_index(manifest: Manifest, shard: Shard) -> SampleIndex:
    """Read the index of a shard and compare it with the manifest.

    Raises:
        MissingIndexError: There is none.
        DataError: It is malformed, another one than the manifest means, or does not fit the shard.
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
        version = record["version"]
        columns = {name: record[name] for name in ("offsets", *_COLUMNS)}
        names, of = record["sources"]["names"], record["sources"]["of"]
        index = SampleIndex(
            offsets=_whole_numbers(columns["offsets"]),
            keys=tuple(str(key) for key in columns["keys"]),
            sizes=tuple(tuple((int(w), int(h)) for w, h in images) for images in columns["sizes"]),
            text_bytes=_whole_numbers(columns["text_bytes"]),
            sources=tuple(names[number] for number in _whole_numbers(of)),
            supervised_bytes=_whole_numbers(columns["supervised_bytes"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"sample index {path} is malformed ({error!r:.200}); {_REMEDY}") from error
    if version != INDEX_VERSION:
        raise DataError(f"sample index {path}: expected version {INDEX_VERSION}, found {version}; {_REMEDY}")
    lengths = {name: len(getattr(index, name)) for name in ("sources", *_COLUMNS)}
    if set(lengths.values()) != {len(index.offsets) - 1}:
        raise DataError(
            f"sample index {path}: expected {len(index.offsets) - 1} entries in every column, found {lengths}; "
            f"{_REMEDY}"
        )
    if any(after <= before for before, after in pairwise(index.offsets)):
        raise DataError(f"sample index {path}: expected offsets that ascend, found others; {_REMEDY}")
    return index


def _whole_numbers(column: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in column):
        raise TypeError("a column holds something else than whole numbers")
    return tuple(column)
