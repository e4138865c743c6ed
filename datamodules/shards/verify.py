"""`shards verify`: everything that can be wrong with a dataset, by shard, member and offset (no torch here)."""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image

from ..storage.fetching import MissingFileError, file_digest
from .index import IndexRow, MissingIndexError, index_path, index_row, load_index
from .manifest import Manifest, Shard, read_manifest
from .sample import SampleError, check_record
from .sample_formats import FORMATS, Adapter, read_normal
from .shard_file import upright_size
from .tar_walk import Damage, Member, SeenKeys, read_sample, sample_groups, tar_paths, walk


@dataclass(kw_only=True, slots=True)
class Verification:
    """Checks of one dataset; `images`: every image is decoded, which takes most of the time, `checksums`: sha256.

    `seen` is key -> shard it was first found in.
    """

    adapter: Adapter = read_normal
    images: bool = True
    checksums: bool = True
    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, folder: Path, progress: Callable[[Shard], None] = lambda shard: None) -> Iterator[Damage]:
        """Yield all damages of the dataset in a folder, shard by shard; DataError: no manifest, or an invalid one."""
        manifest = read_manifest(folder)
        known = {shard.path for shard in manifest.shards}
        for path in tar_paths(folder):
            if path.name not in known:
                yield _damage(path.name, "not_listed", "the manifest does not list this shard")
        for shard in manifest.shards:
            progress(shard)
            yield from self._shard(manifest, shard)
        total = sum(shard.num_samples for shard in manifest.shards)
        if total != manifest.num_samples:
            message = f"num_samples is {manifest.num_samples}, the shards sum to {total}"
            yield _damage("manifest.json", "wrong_count", message)

    def _shard(self, manifest: Manifest, shard: Shard) -> Iterator[Damage]:
        damage = partial(_damage, shard.path)
        try:
            path = manifest.shard_path(shard)
            size = path.stat().st_size if path.is_file() else None
        except MissingFileError:
            size = None
        except DataError as error:
            yield damage("not_fetched", str(error))
            return
        if size is None:
            yield damage("missing", "the manifest lists this shard, but it is not there")
            return
        if size != shard.bytes:
            yield damage("wrong_size", f"expected {shard.bytes} bytes, found {size}")
        elif self.checksums and shard.sha256 and file_digest(path) != shard.sha256:
            yield damage("wrong_sha256", "the content has changed: another checksum")
        walked = list(walk(path))
        yield from (found for found in walked if isinstance(found, Damage))
        samples = list(sample_groups(found for found in walked if isinstance(found, Member)))
        rows: list[IndexRow | None] = []
        seen = SeenKeys(path.name)
        for key, group in samples:
            if fault := seen.add(key, group):
                rows.append(None)
                yield fault
            else:
                yield from self._sample(path, key, group, rows)
        if len(samples) != shard.num_samples:
            yield damage("wrong_count", f"expected {shard.num_samples} samples, found {len(samples)}")
        end = samples[-1][1][-1].end if samples else 0
        yield from _index_damage(manifest, shard, [(key, group[0].begin) for key, group in samples], rows, end)

    def _sample(self, path: Path, key: str, members: list[Member], rows: list[IndexRow | None]) -> Iterator[Damage]:
        first = members[0]
        rows.append(None)
        damage = partial(_damage, path.name, member=first.name, offset=first.offset)
        if key in self.seen:
            yield damage("repeated_key", f"sample {key!r} is in {self.seen[key]} already")
        self.seen.setdefault(key, path.name)
        with path.open("rb") as stream:
            raw = read_sample(stream, key, members, url=str(path))
        try:
            record, images, files = self.adapter(raw)
            check_record(record, num_images=len(images), where=key)
            sizes = [upright_size(data, name=file) for data, file in zip(images, files, strict=True)]
            rows[-1] = index_row(record, offset=first.begin, key=key, sizes=sizes, source="")
        except DataError as error:
            yield damage(error.reason if isinstance(error, SampleError) else "not_a_sample", str(error))
            return
        if self.checksums:
            yield from _other_images(record.get("images"), images, files, sizes, damage)
        for data, file in zip(images, files, strict=True) if self.images else ():
            try:
                load_image(data, name=file)
            except DataError as error:
                yield damage("undecodable_image", str(error))


def _index_damage(
    manifest: Manifest, shard: Shard, samples: list[tuple[str, int]], rows: list[IndexRow | None], end: int
) -> Iterator[Damage]:
    """Compare the index of a shard with the shard; rows of invalid samples are None.

    Sources are not compared: `prepare index` sets those of samples that name none.
    """
    damage = partial(_damage, index_path(Path(shard.path)).name)
    try:
        index = load_index(manifest, shard)
    except MissingIndexError:
        yield damage("missing_index", "the shard has no sample index; `prepare index FOLDER` writes it")
        return
    except DataError as error:
        yield damage("wrong_index", str(error))
        return
    held = list(index)
    found = [*((row.key, row.offset) for row in held), ("the end", index.end)]
    for (key, offset), (wanted_key, wanted) in zip(found, [*samples, ("the end", end)], strict=False):
        if (key, offset) != (wanted_key, wanted):
            yield damage("wrong_index", f"expected {wanted_key!r} at byte {wanted}, found {key!r} at {offset}")
            return
    for row, other in zip(rows, held, strict=False):
        if row and replace(row, source=other.source) != other:
            yield damage("wrong_index", f"expected {row}, found {other}")
            return


def _other_images(
    described: object,
    images: Sequence[bytes],
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    damage: Callable[[str, str], Damage],
) -> Iterator[Damage]:
    """Compare images with what their record says: changed bytes in a JPEG decode without an error."""
    if not isinstance(described, list):
        return
    for entry, size, data, file in zip(described, sizes, images, files, strict=True):
        found = {"w": size[0], "h": size[1], "sha256": hashlib.sha256(data).hexdigest()}
        wrong = [name for name, value in found.items() if entry.get(name, value) != value]
        if wrong:
            listing = ", ".join(f"{name} {entry[name]!r:.20}, found {found[name]!r:.20}" for name in wrong)
            yield damage("wrong_picture", f"{file} is not the image that its json describes: expected {listing}")


def _damage(shard: str, kind: str, message: str, **place: Any) -> Damage:
    return Damage(shard=shard, kind=kind, message=message, **place)


def main(argv: Sequence[str]) -> int:
    """Run `shards verify`: print every damage; 1 where there is one."""
    parser = argparse.ArgumentParser(prog="shards verify", description=(__doc__ or "").split(":")[1].strip())
    parser.add_argument("folders", type=Path, nargs="+", help="folders of datasets")
    parser.add_argument("--format", choices=FORMATS, default="normal", help="what the tars hold; default: %(default)s")
    parser.add_argument("--fast", action="store_true", help="neither checksums nor images")
    options = parser.parse_args(argv)
    check = Verification(adapter=FORMATS[options.format], images=not options.fast, checksums=not options.fast)
    kinds: Counter[str] = Counter()
    for folder in options.folders:
        for damage in check(folder, _print_progress):
            kinds[damage.kind] += 1
            sys.stdout.write(f"{folder}/{damage}\n")
    listing = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    sys.stdout.write(f"{kinds.total()} damages ({listing})\n" if kinds else "no damage\n")
    return int(bool(kinds))


def _print_progress(shard: Shard) -> None:
    sys.stderr.write(f"{shard.path}: {shard.num_samples} samples\n")
