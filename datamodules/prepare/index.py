"""`prepare index`: manifest and sample indexes for shards made elsewhere (img2dataset, pixparse) or without indexes.

Every tar is read once, header by header, so damage is found. An existing manifest is kept and completed.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.skipped import SkippedSamples

from ..shards.index import IndexRow, index_path, index_row, write_index
from ..shards.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, verify_shard, write_manifest
from ..shards.sample import SampleError, check_record
from ..shards.sample_formats import (
    FORMATS,
    Adapter,
    CaptionReader,
    NormalSample,
    RawSample,
    read_bigdocs,
    read_docdownstream,
)
from ..shards.shard_file import upright_size
from ..shards.tar_walk import Damage, SeenKeys, read_sample, require_members, sample_groups, tar_paths, walk
from ..storage.fetching import file_digest
from ..storage.file_kinds import compressed_name, path_text
from .pack.options import DEFAULT_WORKERS, require_at_least

AUTO = "auto"
Indexed = tuple[Shard, Counter[str], SkippedSamples]  # entry of a shard, its samples by source, its invalid samples


def read_any_format(raw: RawSample, *, source: str) -> NormalSample:
    """Read a conversation, a captioned image with a ``source``, or a BigDocs row, as its members suggest."""
    try:
        record = json.loads(raw.get("json", b"{}"))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and "messages" in record:
        return read_docdownstream(raw)
    if "txt" in raw or (isinstance(record, dict) and "caption" in record):
        return CaptionReader(prompt="", source=source)(raw)
    return read_bigdocs(raw)


def _index_shard(path: Path, *, folder: Path, format: str, source: str) -> Indexed:
    """Write the index of a shard beside the one that it may have."""
    named: dict[str, Adapter] = {
        AUTO: partial(read_any_format, source=source),
        "captions": CaptionReader(prompt="", source=source),
    }
    rows, end, invalid = read_samples(path, adapter=(FORMATS | named)[format], source=source)
    shard = Shard(
        path=path.relative_to(folder).as_posix(),
        num_samples=len(rows),
        bytes=path.stat().st_size,
        sha256=file_digest(path),
        index_sha256=write_index(_new_index(path), rows, end=end),
    )
    return shard, Counter(row.source for row in rows), invalid


def _new_index(path: Path) -> Path:
    """Return where an index waits for those of the other shards."""
    return path.with_suffix(".index.new")


def index_shards(
    folder: Path | str,
    *,
    name: str | None = None,
    source: str | None = None,
    license: str | None = None,
    format: str = AUTO,
    workers: int = 1,
) -> Manifest:
    """Index every tar of a folder, and write and return the folder's manifest; an error leaves the folder as it is.

    Args:
        folder: Folder with ``*.tar`` files. The fields of an existing manifest are kept.
        name: Name of the dataset; None for that of the manifest, or of the folder.
        source: The ``source`` of samples that name none; None for that of the manifest, or ``cc12m``.
        license: Terms of the dataset; None for those of the manifest, or ``unknown``.
        format: What the tars hold: a key of ``sample_formats.FORMATS``, or ``auto`` to detect it per sample.
        workers: Processes that read shards.

    Raises:
        DataError: No tar in the folder, one that is cut, damaged or empty, one that is not as the manifest says, or
            samples of another format, or none that is valid.
    """
    require_at_least(1, workers=workers)
    folder = Path(folder)
    old = read_manifest(folder) if (folder / MANIFEST_NAME).exists() else None
    paths = _checked(old, folder) if old else tar_paths(folder)
    if not paths:
        packed = compressed_name((path.name for path in sorted(folder.glob("*"))), ".tar")
        raise DataError(f"no *.tar file in {folder}; {packed or 'nothing to index'}")
    source = source or (old.source if old else "cc12m")
    read = partial(_index_shard, folder=folder, format=format, source=source)
    try:
        with ProcessPoolExecutor(min(workers, len(paths))) as pool:
            entries = pool.map(read, paths) if workers > 1 else map(read, paths)
            shards, counted, skipped = zip(*tqdm(entries, total=len(paths), unit="shard", desc="index"), strict=True)
        sources, invalid = sum(counted, Counter[str]()), SkippedSamples(keep=1)
        for found in skipped:
            invalid.merge(found)
        if invalid.counts.total() == sources.total():
            first = next(iter(invalid.messages.values()))[0]
            raise DataError(
                f"{folder}: none of {sources.total()} samples is valid as --format {format} ({invalid}); the first: "
                f"{first}"
            )
        for before, after in zip(old.shards if old else (), shards, strict=False):
            if before.num_samples != after.num_samples:
                raise DataError(
                    f"shard {folder / before.path}: {MANIFEST_NAME} says {before.num_samples} samples, found "
                    f"{after.num_samples}; copy it again or rebuild the dataset"
                )
        for path in paths:
            _new_index(path).replace(index_path(path))
            path.with_suffix(".index.json").unlink(missing_ok=True)  # the format of before
    finally:
        for path in paths:
            _new_index(path).unlink(missing_ok=True)
    old = old or Manifest(
        folder=folder,
        name=path_text(folder.resolve().name),
        source=source,
        license="unknown",
        num_samples=sources.total(),
        shards=shards,
        sources=dict(sources),
    )
    extra = {key: value for key, value in old.extra.items() if key != "unreadable"}
    if invalid.counts:
        extra["unreadable"] = dict(sorted(invalid.counts.items()))
    manifest = replace(
        old, name=name or old.name, source=source, license=license or old.license, shards=shards, extra=extra
    )
    write_manifest(manifest)
    return manifest


def read_samples(path: Path, *, adapter: Adapter, source: str) -> tuple[list[IndexRow], int, SkippedSamples]:
    """Read position, text length and image sizes of the samples of a tar, each of which the `adapter` reads.

    Returns:
        A row for each sample, of invalid ones without text; the byte after the last one; the invalid ones by reason.

    Raises:
        DataError: The tar is cut, damaged, compressed or holds no sample, a sample or member is there twice, members of
            a sample stand apart, or its samples are of another format.
    """
    rows: list[IndexRow] = []
    invalid = SkippedSamples(keep=1)
    end = 0
    where = f"shard {path}"
    groups, seen = list(sample_groups(require_members(walk(path), partial(_unread, where)))), SeenKeys(path.name)
    for key, members in groups:
        if fault := seen.add(key, members):
            raise DataError(f"{where}: {fault.message}")
    with path.open("rb") as stream:
        for key, members in groups:
            raw = read_sample(stream, key, members, url=str(path))
            offset, end = members[0].begin, members[-1].end
            try:
                record, images, files = adapter(raw)
                check_record(record, num_images=len(images), where=key)
                sizes = [upright_size(i, name=f"{key}.{f}") for i, f in zip(images, files, strict=True)]
            except SampleError as error:
                invalid.add(error.reason, str(error))
                rows.append(IndexRow(offset=offset, key=key, source=source))
                continue
            except DataError as error:
                raise DataError(f"{error}; or name what the tars hold with --format") from error
            rows.append(index_row(record, offset=offset, key=key, sizes=sizes, source=source))
    if not rows:
        raise DataError(f"{where} holds no sample; remove it")
    return rows, end, invalid


def _unread(where: str, damage: Damage) -> DataError:
    state = "cannot be read" if damage.kind == "compressed" else "is cut or damaged"
    return DataError(f"{where} {state}: {damage.with_advice('copy it again')}")


def main(argv: Sequence[str]) -> None:
    """Run `prepare index`."""
    parser = argparse.ArgumentParser(prog="prepare index", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="folder with *.tar files")
    parser.add_argument("--name", help="name of the dataset (default: the manifest's, or the name of the folder)")
    parser.add_argument("--source", help="source of samples that name none (default: the manifest's, or cc12m)")
    parser.add_argument("--license", help="terms of the dataset (default: the manifest's, or unknown)")
    parser.add_argument(
        "--format",
        choices=(AUTO, *FORMATS),
        default=AUTO,
        help="what the tars hold (default: detected by each sample's members)",
    )
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS, help="processes; default: %(default)s")
    manifest = index_shards(**vars(parser.parse_args(list(argv))))
    sys.stdout.write(
        f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {manifest.folder}/{MANIFEST_NAME}\n"
    )
    for reason, count in manifest.extra.get("unreadable", {}).items():
        sys.stdout.write(f"unreadable: {count} ({reason})\n")


def _checked(manifest: Manifest, folder: Path) -> list[Path]:
    """Return the shards of a manifest after a check that they match it and that there are no others."""
    foreign = {path.name for path in tar_paths(folder)} - {shard.path for shard in manifest.shards}
    if foreign:
        raise DataError(
            f"{folder} holds {min(foreign)}, which its {MANIFEST_NAME} does not list; remove the shard, or the "
            "manifest to index all shards anew"
        )
    for shard in manifest.shards:
        verify_shard(manifest.shard_path(shard), shard, verify_sha256=True)
    return [manifest.shard_path(shard) for shard in manifest.shards]
