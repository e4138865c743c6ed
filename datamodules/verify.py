"""`shards verify`: everything that can be wrong with a set of shards, by shard, member and offset (no torch here)."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from alignvlm_pl.errors import DataError
from alignvlm_pl.imaging import load_image

from .manifest import Manifest, Shard, file_sha256, read_manifest
from .normal_form import (
    Adapter,
    CaptionReader,
    NormalSample,
    read_bigdocs,
    read_docdownstream,
    read_normal,
)
from .sample import SampleError, check_record
from .tar_walk import Damage, Member, walk

FORMATS: dict[str, Adapter] = {
    "normal": read_normal,
    "docdownstream": read_docdownstream,
    "bigdocs": read_bigdocs,
    "captions": CaptionReader(prompt=""),
}


@dataclass(kw_only=True, slots=True)
class Verification:
    """Checks of one set.

    Attributes:
        adapter: Reads the members of the source's format.
        images: Whether every picture is decoded, which takes most of the time.
        checksums: Whether the shards' sha256 is compared.
        seen: Key -> shard it was first found in.
    """

    adapter: Adapter = read_normal
    images: bool = True
    checksums: bool = True
    seen: dict[str, str] = field(default_factory=dict)

    def __call__(
        self, folder: Path, progress: Callable[[Shard], None] = lambda shard: None
    ) -> Iterator[Damage]:
        """Yield all damages of the set in a folder, shard by shard.

        Raises:
            DataError: There is no manifest, or it is malformed.
        """
        manifest = read_manifest(folder)
        known = {shard.path for shard in manifest.shards}
        for path in sorted(folder.glob("*.tar")):
            if path.name not in known:
                yield Damage(
                    shard=path.name, kind="not_listed", message="the manifest does not list this shard"
                )
        for shard in manifest.shards:
            progress(shard)
            yield from self._shard(manifest, shard)
        total = sum(shard.num_samples for shard in manifest.shards)
        if total != manifest.num_samples:
            message = f"num_samples is {manifest.num_samples}, the shards sum to {total}"
            yield Damage(shard="manifest.json", kind="wrong_count", message=message)

    def _shard(self, manifest: Manifest, shard: Shard) -> Iterator[Damage]:
        path = manifest.shard_path(shard)
        if not path.is_file():
            yield Damage(
                shard=shard.path, kind="missing", message="the manifest lists this shard, but it is not there"
            )
            return
        if (size := path.stat().st_size) != shard.bytes:
            message = f"expected {shard.bytes} bytes, found {size}"
            yield Damage(shard=shard.path, kind="wrong_size", message=message)
        elif self.checksums and shard.sha256 and file_sha256(path) != shard.sha256:
            yield Damage(
                shard=shard.path, kind="wrong_sha256", message="the content has changed: another checksum"
            )
        members: list[Member] = []
        for found in walk(path):
            if isinstance(found, Damage):
                yield found
            else:
                members.append(found)
        samples = [(key, list(group)) for key, group in groupby(members, key=_key)]
        for key, group in samples:
            yield from self._sample(path, key, group)
        if len(samples) != shard.num_samples:
            message = f"expected {shard.num_samples} samples, found {len(samples)}"
            yield Damage(shard=shard.path, kind="wrong_count", message=message)

    def _sample(self, path: Path, key: str, members: list[Member]) -> Iterator[Damage]:
        first = members[0]

        def damage(kind: str, message: str, member: Member = first) -> Damage:
            return Damage(
                shard=path.name, kind=kind, message=message, member=member.name, offset=member.offset
            )

        if key in self.seen:
            yield damage("repeated_key", f"sample {key!r} is in {self.seen[key]} already")
        self.seen.setdefault(key, path.name)
        raw: dict[str, object] = {"__key__": key, "__url__": str(path)}
        with path.open("rb") as stream:
            for member in members:
                name = _field(member)
                if name in raw:
                    yield damage("repeated_member", f"sample {key!r} has this member twice", member)
                    continue
                stream.seek(member.data_offset)
                raw[name] = stream.read(member.size)
        try:
            normal = self.adapter(raw)
            check_record(normal[0], num_images=len(normal[1]), where=key)
        except SampleError as error:
            yield damage(error.reason, str(error))
            return
        except DataError as error:
            yield damage("not_a_sample", str(error))
            return
        if self.images:
            yield from _undecodable(normal, damage)


def _undecodable(normal: NormalSample, damage: Callable[..., Damage]) -> Iterator[Damage]:
    for data, file in zip(normal[1], normal[2], strict=True):
        try:
            load_image(data, name=file)
        except DataError as error:
            yield damage("undecodable_image", str(error))


def main(argv: Sequence[str]) -> int:
    """Run `shards verify`: print every damage; 1 where there is one."""
    parser = argparse.ArgumentParser(prog="shards verify", description=(__doc__ or "").split(":")[1].strip())
    parser.add_argument("folders", type=Path, nargs="+", help="folders of sets")
    parser.add_argument(
        "--format", choices=FORMATS, default="normal", help="what the tars hold; default: %(default)s"
    )
    parser.add_argument("--fast", action="store_true", help="neither checksums nor pictures")
    options = parser.parse_args(argv)
    check = Verification(adapter=FORMATS[options.format], images=not options.fast, checksums=not options.fast)
    kinds: Counter[str] = Counter()
    for folder in options.folders:
        for damage in check(folder, lambda shard: _tell(f"{shard.path}: {shard.num_samples} samples")):
            kinds[damage.kind] += 1
            sys.stdout.write(f"{folder}/{damage}\n")
    listing = ", ".join(f"{kind}: {count}" for kind, count in kinds.most_common())
    sys.stdout.write(f"{kinds.total()} damages ({listing})\n" if kinds else "no damage\n")
    return int(bool(kinds))


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _key(member: Member) -> str:
    """Name of the sample a member belongs to, by webdataset's rule: up to the first dot of the file's own name."""
    folder, slash, name = member.name.rpartition("/")
    return f"{folder}{slash}{name.split('.', 1)[0]}"


def _field(member: Member) -> str:
    return member.name.rpartition("/")[2].partition(".")[2].lower()
