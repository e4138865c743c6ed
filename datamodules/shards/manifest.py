"""`manifest.json` beside the shards: sizes, counts and checksums of a dataset; nothing is read without it (no torch).

A tar that is cut at a member reads as a shorter tar without any error. A manifest may come from a server, so its size,
types and file names are checked before anything is opened.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import write_atomically
from alignvlm_pl.utils.text_files import parse_json, repeated_name

from ..storage.fetching import Expected, MissingFileError, file_digest
from ..storage.location import Storage, check_file_name, format_location

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
# About 300,000 shards.
MAX_MANIFEST_BYTES = 64 << 20
INDEX_SUFFIX = ".index.safetensors"
# About five million samples in one shard.
MAX_INDEX_BYTES = 256 << 20
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file of a dataset: its name in the folder of the manifest, samples, bytes and checksum.

    `index_sha256` is the checksum of the sample index beside it; one that was never computed is empty.
    """

    path: str
    num_samples: int
    bytes: int
    sha256: str = ""
    index_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A dataset.

    Attributes:
        folder: Where it lies: a path, or what `Storage.locate` returns for a URL.
        name: Its name; `source` says where the samples come from, `license` their terms.
        num_samples: Samples in all shards.
        shards: The shards, in the order they were written.
        sources: Number of samples by the ``source`` field of the samples; empty where unknown.
        extra: Further fields of the file (seed, counts of skipped records, …).
        sha256: Checksum of `manifest.json` as it was read; empty for a dataset that was just written.
        storage: How files of a remote dataset are fetched.
    """

    folder: Path | str
    name: str
    source: str
    license: str
    num_samples: int
    shards: tuple[Shard, ...]
    sources: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    storage: Storage = field(default_factory=Storage)

    @property
    def is_remote(self) -> bool:
        """Whether files have to be fetched before they can be opened."""
        return not isinstance(self.folder, Path)

    def shard_path(self, shard: Shard) -> Path:
        """Return the local file of one shard, fetched and checked (DataError) where the dataset is remote."""
        return self.storage.local_path(self.folder, shard.path, Expected(bytes=shard.bytes, sha256=shard.sha256))

    def open_shard(self, shard: Shard) -> BinaryIO:
        """Open one shard for reading; DataError: missing, not to be fetched, or not of the manifest's size."""
        path = self.shard_path(shard)
        verify_shard(path, shard)
        return path.open("rb")

    def index_path(self, shard: Shard) -> Path:
        """Return the local file of the sample index beside a shard; as `shard_path`, and MissingFileError for none."""
        # Without a checksum of the index, that of the shard tells whether a cached index is up to date.
        tag = f"{shard.bytes}/{shard.sha256}"
        name = str(PurePosixPath(shard.path).with_suffix(INDEX_SUFFIX))
        expected = Expected(sha256=shard.index_sha256, tag=tag, limit=MAX_INDEX_BYTES)
        return self.storage.local_path(self.folder, name, expected)

    def locate(self, position: int) -> "Location":
        """Return where the sample at a position of the dataset lies; IndexError where there is none."""
        number = position
        for shard in self.shards:
            if number < shard.num_samples:
                return Location(manifest=self, shard=shard, number=number)
            number -= shard.num_samples
        raise IndexError(position)

    def where(self, name: str = "") -> str:
        """Return how errors name the dataset or a file of it, without passwords."""
        folder = format_location(self.folder)
        return f"{folder}/{name}" if name else folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a sample lies: its dataset, its shard, and its number in the shard."""

    manifest: Manifest
    shard: Shard
    number: int


def read_manifest(folder: Path | str, *, storage: Storage | None = None) -> Manifest:
    """Read the manifest of a dataset, and none of its shards; arguments and errors as in `load_manifest`."""
    storage = storage or Storage()
    located = storage.locate(folder)
    where = f"{format_location(located)}/{MANIFEST_NAME}"
    record, digest = _read_json(located, where, storage)
    return _parse(record, folder=located, where=where, sha256=digest, storage=storage)


def load_manifest(folder: Path | str, *, storage: Storage | None = None) -> Manifest:
    """Read the manifest of a dataset and compare the sizes of its shards; of a remote dataset, when they are fetched.

    Args:
        folder: Folder or URL that holds ``manifest.json``; a URL that is not supported is a ConfigError.
        storage: How a remote dataset is fetched; None: the defaults. DataError: what comes is not as described.
    """
    manifest = read_manifest(folder, storage=storage)
    for shard in () if manifest.is_remote else manifest.shards:
        verify_shard(manifest.shard_path(shard), shard)
    found = sum(shard.num_samples for shard in manifest.shards)
    if found != manifest.num_samples:
        raise DataError(
            f"{manifest.where(MANIFEST_NAME)}: num_samples is {manifest.num_samples}, the shards sum to {found}; "
            "write the dataset again"
        )
    return manifest


def verify_shard(path: Path, shard: Shard, *, verify_sha256: bool = False) -> None:
    """Compare a local shard file with its entry in the manifest; raise DataError where it is missing or differs."""
    if not path.is_file():
        raise DataError(f"shard {path} is missing but {MANIFEST_NAME} lists it; copy it again or rebuild the dataset")
    size = path.stat().st_size
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "changed"
        raise DataError(
            f"shard {path} is {state}: expected {shard.bytes} bytes, found {size}; copy it again or rebuild the dataset"
        )
    if verify_sha256 and shard.sha256 and (digest := file_digest(path)) != shard.sha256:
        raise DataError(
            f"shard {path} is damaged: expected sha256 {shard.sha256[:16]}…, found {digest[:16]}…; copy it again"
        )


def write_manifest(manifest: Manifest) -> Path:
    """Write `manifest.json` atomically: the last step of making a dataset, without which it does not load.

    Raises a DataError for a remote folder, and where it cannot be written.
    """
    record = {
        "version": MANIFEST_VERSION,
        "name": manifest.name,
        "source": manifest.source,
        "license": manifest.license,
        "num_samples": manifest.num_samples,
        "sources": dict(sorted(manifest.sources.items())),
        **manifest.extra,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    if not isinstance(manifest.folder, Path):
        raise DataError(f"cannot write {manifest.where(MANIFEST_NAME)}: datasets are written to local folders")
    path = manifest.folder / MANIFEST_NAME
    try:
        write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    return path


def _read_json(folder: Path | str, where: str, storage: Storage) -> tuple[Mapping[str, Any], str]:
    """Return the object in a manifest and the checksum of the file."""
    try:
        content = storage.read_small(folder, MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except MissingFileError as error:
        if isinstance(folder, Path) and folder.is_file():
            raise DataError(f"{folder} is a file: give the folder of the dataset, with its {MANIFEST_NAME}") from error
        absent = isinstance(folder, Path) and not folder.is_dir()
        what = "no such folder" if absent else f"no {MANIFEST_NAME} in it"
        raise DataError(
            f"{format_location(folder)} is not a complete dataset: {what}; its writing was interrupted or "
            "never ran (make the dataset again, or index shards made elsewhere with `prepare index`)"
        ) from error
    try:
        record = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); write the dataset again") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version != MANIFEST_VERSION:
        raise DataError(f"{where}: expected version {MANIFEST_VERSION}, found {version!r:.40}; write the dataset again")
    return record, hashlib.sha256(content).hexdigest()


def _parse(record: Mapping[str, Any], *, where: str, **read: Any) -> Manifest:
    """Return the manifest of a record; `read` are the fields that come from elsewhere."""
    known = {"version", "name", "source", "license", "num_samples", "sources", "shards"}
    try:
        shards = tuple(_parse_shard(entry, where=where) for entry in _checked(list, record["shards"]))
        manifest = Manifest(
            name=_checked(str, record["name"]),
            source=_checked(str, record["source"]),
            license=_checked(str, record["license"]),
            num_samples=_count(record["num_samples"]),
            shards=shards,
            sources={name: _count(number) for name, number in _checked(dict, record.get("sources", {})).items()},
            extra={key: value for key, value in record.items() if key not in known},
            **read,
        )
        _check_extra(manifest.extra)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: a field is missing or malformed ({error!s:.200}); write it again") from error
    if not shards or manifest.num_samples < 1:
        raise DataError(f"{where}: the dataset is empty ({len(shards)} shards); write it again")
    if repeated := repeated_name(shard.path for shard in shards):
        raise DataError(f"{where}: shard {repeated} is listed twice; write the dataset again")
    return manifest


def _parse_shard(entry: Mapping[str, Any], *, where: str) -> Shard:
    return Shard(
        path=check_file_name(entry["path"], where=where),
        num_samples=_count(entry["num_samples"]),
        bytes=_count(entry["bytes"]),
        sha256=_checksum(entry.get("sha256", "")),
        index_sha256=_checksum(entry.get("index_sha256", "")),
    )


def _check_extra(extra: Mapping[str, Any]) -> None:
    """Check the further fields that `BenchmarkDataset` reads."""
    for name in ("benchmark", "origin"):
        _checked(str, extra.get(name, ""))
    for number in _checked(dict, extra.get("skipped", {})).values():
        _count(number)
    for examples in _checked(dict, extra.get("skipped_first", {})).values():
        for example in _checked(list, examples):
            _checked(str, example)


def _checked(kind: type[Kind], value: Any) -> Kind:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, found {value!r:.80}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number, found {value!r:.80}")
    return value


def _checksum(value: Any) -> str:
    if not re.fullmatch("([0-9a-f]{64})?", _checked(str, value)):
        raise TypeError(f"expected 64 hexadecimal digits, found {value!r:.80}")
    return str(value)
