"""Sample index of a shard, `name-00000.index.safetensors` beside `name-00000.tar` (no torch here).

With it a reader seeks to any sample, and counts tiles and estimates tokens without opening an image. The file is mapped
into memory: a reader of many shards opens one in microseconds, and reads the rows that it needs.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import atomic_path

from ..storage.fetching import MissingFileError
from .manifest import Manifest, Shard
from .sample import message_text

INDEX_VERSION = 2
_REMEDY = "`prepare index FOLDER` writes it"
_ENTRIES = ("text_bytes", "supervised_bytes", "sources")
# Where the key and the images of each sample begin in the columns of all keys and sizes.
_STARTS = {"key_starts": "keys", "image_starts": "sizes"}
_TYPES = {"offsets": np.uint64, "keys": np.uint8} | dict.fromkeys((*_ENTRIES, *_STARTS, "sizes"), np.uint32)


class MissingIndexError(DataError):
    """A shard has no index beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRow:
    """One sample of a shard.

    Attributes:
        offset: Byte of the shard where its first header begins, one that only carries a long name included.
        key: Its name, as `source` is that of its source.
        sizes: Upright (width, height) in pixels of each image; empty for text alone.
        text_bytes: UTF-8 bytes of all text of the messages; of a caption pair, of the caption.
        supervised_bytes: UTF-8 bytes of the assistant's turns; 0: nothing is supervised.
    """

    offset: int
    key: str
    sizes: tuple[tuple[int, int], ...] = ()
    text_bytes: int = 0
    source: str = ""
    supervised_bytes: int = 0


class SampleIndex:
    """The samples of one shard in their order; one row is read from the mapped file when it is asked for.

    A file that is malformed, or of another version, is a DataError.
    """

    def __init__(self, path: Path) -> None:
        try:
            file = safe_open(path, "numpy")
            self._columns = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads((file.metadata() or {}).get("index", "{}"))
            version, self.source_names = described.get("version"), tuple(map(str, described.get("sources", ())))
        except (SafetensorError, ValueError, TypeError, AttributeError) as error:
            raise _index_error(path, f"malformed ({error!r:.200})") from error
        if version != INDEX_VERSION:
            raise _index_error(path, f"expected version {INDEX_VERSION}, found {version}")
        shapes = {name: column.get_shape() for name, column in self._columns.items()}
        self._length = max(shapes.get("offsets", [0])[0] - 1, 0)
        expected = {name: [self._length] for name in _ENTRIES}
        expected |= {name: [self._length + 1] for name in ("offsets", *_STARTS)}
        expected |= {"keys": shapes.get("keys", [0])[:1], "sizes": [*shapes.get("sizes", [0])[:1], 2]}
        if shapes != expected:
            raise _index_error(path, f"expected columns of {expected}, found {shapes}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> IndexRow:
        """Return the row of a sample."""
        if not 0 <= number < self._length:
            raise IndexError(number)
        return next(self._rows(number, number + 1))

    def __iter__(self) -> Iterator[IndexRow]:
        """Yield all rows, of columns that are read at once."""
        return self._rows(0, self._length)

    def _rows(self, first: int, last: int) -> Iterator[IndexRow]:
        entries = [self._read(name, first, last).tolist() for name in ("offsets", *_ENTRIES)]
        key_starts, image_starts = (self._read(name, first, last + 1) for name in _STARTS)
        keys = self._read("keys", key_starts[0], key_starts[-1]).tobytes()
        sizes = [tuple(size) for size in self._read("sizes", image_starts[0], image_starts[-1]).tolist()]
        parts = [pairwise((starts - starts[0]).tolist()) for starts in (key_starts, image_starts)]
        for offset, text_bytes, supervised_bytes, source, key, images in zip(*entries, *parts, strict=True):
            yield IndexRow(
                offset=offset,
                key=keys[slice(*key)].decode("utf-8", "surrogatepass"),
                sizes=tuple(sizes[slice(*images)]),
                text_bytes=text_bytes,
                source=self.source_names[source],
                supervised_bytes=supervised_bytes,
            )

    def of_sources(self, names: Collection[str]) -> list[int]:
        """Return the numbers of the samples whose source is one of `names`."""
        wanted = [number for number, name in enumerate(self.source_names) if name in names]
        found: list[int] = np.flatnonzero(np.isin(self._read("sources"), wanted)).tolist()
        return found

    @property
    def end(self) -> int:
        """Byte of the shard where the data of the last sample ends, padded to whole blocks."""
        return int(self._read("offsets", self._length)[0])

    def extent(self, number: int) -> tuple[int, int]:
        """Return the first byte of a sample in the shard, and the first byte after it."""
        start, stop = self._read("offsets", number, number + 2).tolist()
        return start, stop

    def check(self) -> None:
        """Read all columns; ValueError: an offset does not ascend, or a number points past a column."""
        columns = {name: self._read(name) for name in self._columns}
        if wrong := [name for name, column in columns.items() if column.dtype != _TYPES[name]]:
            raise ValueError(f"columns {', '.join(wrong)} are not of the types of an index")
        offsets = columns["offsets"]
        if (offsets[1:] <= offsets[:-1]).any():
            raise ValueError("expected offsets that ascend")
        for name, of in _STARTS.items():
            starts = columns[name]
            if starts[0] != 0 or starts[-1] != len(columns[of]) or (starts[1:] < starts[:-1]).any():
                raise ValueError(f"expected {name} that ascend from 0 to {len(columns[of])}")
        if (columns["sources"] >= len(self.source_names)).any():
            raise ValueError(f"a sample is of none of the {len(self.source_names)} sources")
        if not _whole_characters(columns["keys"], columns["key_starts"]):
            raise ValueError("expected keys in UTF-8, each from the first byte of a character")

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a part of a column; of safetensors, an empty one cannot be read."""
        column = self._columns[name]
        stop = column.get_shape()[0] if stop is None else stop
        return column[int(start) : int(stop)] if stop > start else np.zeros((0, *column.get_shape()[1:]), _TYPES[name])


def _whole_characters(text: np.ndarray, starts: np.ndarray) -> bool:
    """Return whether bytes (n) are UTF-8, and none of the `starts` lies within a character."""
    try:
        text.tobytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return not (text[starts[starts < len(text)]] & 0xC0 == 0x80).any()


def index_path(shard: Path) -> Path:
    """Return the path of the index of a shard."""
    return shard.with_suffix(".index.safetensors")


def index_row(
    record: Mapping[str, Any], *, offset: int, key: str, sizes: Iterable[tuple[int, int]], source: str
) -> IndexRow:
    """Return the row of a checked record; `source` is used where the record names none."""
    texts = [(turn["role"], len(message_text(turn).encode())) for turn in record["messages"]]
    return IndexRow(
        offset=offset,
        key=key,
        sizes=tuple(sizes),
        text_bytes=sum(size for _, size in texts),
        source=str(record.get("source") or source),
        supervised_bytes=sum(size for role, size in texts if role == "assistant"),
    )


def write_index(path: Path, rows: Sequence[IndexRow], *, end: int) -> str:
    """Write the index of a shard to its path, complete or not at all, and return the sha256 of the file.

    `rows` are the samples of the shard in their order, `end` the byte where the data of the last one ends.
    """
    names = sorted({row.source for row in rows})
    numbers = {name: number for number, name in enumerate(names)}
    keys = [row.key.encode("utf-8", "surrogatepass") for row in rows]
    columns: dict[str, Any] = {
        "offsets": [*(row.offset for row in rows), end],
        "text_bytes": [row.text_bytes for row in rows],
        "supervised_bytes": [row.supervised_bytes for row in rows],
        "sources": [numbers[row.source] for row in rows],
        "key_starts": [*accumulate(map(len, keys), initial=0)],
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "image_starts": [*accumulate((len(row.sizes) for row in rows), initial=0)],
        "sizes": np.array([size for row in rows for size in row.sizes], np.uint32).reshape(-1, 2),
    }
    # One key of metadata: safetensors writes several in no fixed order, and two runs shall give the same bytes.
    described = {"index": json.dumps({"version": INDEX_VERSION, "sources": names})}
    data = save({name: np.asarray(column, _TYPES[name]) for name, column in columns.items()}, described)
    with atomic_path(path) as partial:
        partial.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_index(manifest: Manifest, shard: Shard) -> SampleIndex:
    """Map the index of a shard, which is compared with the manifest when a process first meets it.

    MissingIndexError: there is none; DataError: it is malformed, or does not fit manifest and shard.
    """
    path: Path | str = manifest.where(index_path(Path(shard.path)).name)
    try:
        path = manifest.index_path(shard)
        now = path.stat()
        _check(path, (now.st_ino, now.st_size, now.st_mtime_ns), shard)
        return SampleIndex(path)
    except (OSError, MissingFileError) as error:
        raise MissingIndexError(f"there is no sample index {path} ({error}); {_REMEDY}") from error


@cache
def _check(path: Path, state: tuple[int, ...], shard: Shard) -> None:
    """Read all of an index; once for each `state` of the file."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if shard.index_sha256 not in ("", found):
        raise _index_error(path, f"expected sha256 {shard.index_sha256[:16]}…, found {found[:16]}…")
    index = SampleIndex(path)
    if len(index) != shard.num_samples:
        raise _index_error(path, f"expected {shard.num_samples} samples as in the manifest, found {len(index)}")
    try:
        index.check()
    except (ValueError, SafetensorError) as error:
        raise _index_error(path, f"malformed ({error})") from error
    if index.end > shard.bytes:
        raise _index_error(
            path, f"its last sample ends at byte {index.end}, expected at most the {shard.bytes} bytes of the shard"
        )


def _index_error(path: Path, what: str) -> DataError:
    return DataError(f"sample index {path}: {what}; {_REMEDY}")
