"""The manifest beside the shards: what a set holds, so that a cut or missing shard is noticed (no torch).

A tar that ends at a member boundary reads as a shorter tar without any error, so every set carries sizes
and counts in `manifest.json`, and nothing is read without it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar file of a set.

    Attributes:
        path: File name, relative to the folder of the manifest.
        num_samples: Samples in it.
        bytes: Size of the file.
        sha256: Checksum of the file; empty where it was never computed.
        index_sha256: Checksum of the sample index beside it; empty where it was never computed.
    """

    path: str
    num_samples: int
    bytes: int
    sha256: str = ""
    index_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A set of shards.

    Attributes:
        folder: Where it lies.
        name: Name of the set.
        source: Where the samples come from.
        license: Terms of the source.
        num_samples: Samples in all shards.
        shards: The shards, in the order they were written.
        sources: Number of samples by the ``source`` field of the samples; empty where unknown.
        extra: Further fields of the file (seed, counts of skipped records, …).
    """

    folder: Path
    name: str
    source: str
    license: str
    num_samples: int
    shards: tuple[Shard, ...]
    sources: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def shard_path(self, shard: Shard) -> Path:
        """Return the file of one shard."""
        return self.folder / shard.path


def read_manifest(folder: Path | str) -> Manifest:
    """Read the manifest of a set without looking at its shards.

    Raises:
        DataError: No manifest, or a malformed one.
    """
    path = Path(folder) / MANIFEST_NAME
    return _parse(_read_json(path), path)


def load_manifest(folder: Path | str, *, verify_sha256: bool = False) -> Manifest:
    """Read and verify the manifest of a set.

    Sizes of all shards are compared at once, which finds every cut file at no cost; the number of samples
    is compared by the reader at the end of each shard.

    Args:
        folder: Folder that holds ``manifest.json``.
        verify_sha256: Also read every shard and compare its checksum.

    Raises:
        DataError: No manifest, a malformed one, or a shard that is missing or not as described.
    """
    path = Path(folder) / MANIFEST_NAME
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        verify_shard(manifest.shard_path(shard), shard, verify_sha256=verify_sha256)
    found = sum(shard.num_samples for shard in manifest.shards)
    if found != manifest.num_samples:
        raise DataError(
            f"{path}: num_samples is {manifest.num_samples}, the shards sum to {found}; write the set again"
        )
    return manifest


def verify_shard(path: Path, shard: Shard, *, verify_sha256: bool = False) -> None:
    """Compare a shard file with its entry in the manifest.

    Raises:
        DataError: The file is missing, or its size or checksum differs.
    """
    if not path.is_file():
        raise DataError(
            f"shard {path} is missing but {MANIFEST_NAME} lists it; copy it again or rebuild the set"
        )
    size = path.stat().st_size
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "changed"
        raise DataError(
            f"shard {path} is {state}: expected {shard.bytes} bytes, found {size}; "
            "copy it again or rebuild the set"
        )
    if verify_sha256 and shard.sha256 and (digest := file_sha256(path)) != shard.sha256:
        raise DataError(
            f"shard {path} is damaged: expected sha256 {shard.sha256[:16]}…, found {digest[:16]}…; "
            "copy it again"
        )


def file_sha256(path: Path) -> str:
    """Return the checksum of a file, as 64 hexadecimal digits."""
    return file_digest(path, "sha256")


def file_digest(path: Path, algorithm: str) -> str:
    """Return a checksum of a file by one of `hashlib`'s algorithms, in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(manifest: Manifest) -> Path:
    """Write `manifest.json` atomically; the last step of making a set, and what makes it whole."""
    record = {
        "version": MANIFEST_VERSION,
        "name": manifest.name,
        "source": manifest.source,
        "license": manifest.license,
        "num_samples": manifest.num_samples,
        "sources": dict(sorted(manifest.sources.items())),
        **manifest.extra,
        "shards": [
            {
                "path": s.path,
                "num_samples": s.num_samples,
                "bytes": s.bytes,
                "sha256": s.sha256,
                "index_sha256": s.index_sha256,
            }
            for s in manifest.shards
        ],
    }
    path = manifest.folder / MANIFEST_NAME
    partial = path.with_name(MANIFEST_NAME + ".tmp")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
    return path


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        what = "no such folder" if not path.parent.is_dir() else f"no {MANIFEST_NAME} in it"
        raise DataError(
            f"{path.parent} is not a finished set of shards: {what}; its writing was interrupted or "
            "never ran (make the set again, or index foreign shards with `prepare index`)"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); write the set again") from error
    if not isinstance(record, dict) or record.get("version") != MANIFEST_VERSION:
        version = record.get("version") if isinstance(record, dict) else None
        raise DataError(f"{path}: expected version {MANIFEST_VERSION}, found {version}; write the set again")
    return record


def _parse(record: Mapping[str, Any], path: Path) -> Manifest:
    known = {"version", "name", "source", "license", "num_samples", "sources", "shards"}
    try:
        shards = tuple(
            Shard(
                path=s["path"],
                num_samples=s["num_samples"],
                bytes=s["bytes"],
                sha256=s.get("sha256", ""),
                index_sha256=s.get("index_sha256", ""),
            )
            for s in record["shards"]
        )
        manifest = Manifest(
            folder=path.parent,
            name=record["name"],
            source=record["source"],
            license=record["license"],
            num_samples=record["num_samples"],
            shards=shards,
            sources=dict(record.get("sources", {})),
            extra={key: value for key, value in record.items() if key not in known},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: a field is missing or malformed ({error}); write the set again") from error
    if not shards or manifest.num_samples < 1:
        raise DataError(f"{path}: the set is empty ({len(shards)} shards); write it again")
    return manifest
