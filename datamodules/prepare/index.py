"""`prepare index`: a manifest for shards made elsewhere (img2dataset, pixparse), by reading them once."""

import argparse
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from alignvlm_pl.errors import DataError

from ..manifest import MANIFEST_NAME, Manifest, Shard, file_sha256, write_manifest

# webdataset's rule: the key of a member ends at the first dot of its base name.
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
# Two blocks of zeros end a tar; a tar that was cut, even between two members, does not have them.
_END_OF_TAR = bytes(1024)


def index_shards(folder: Path | str, *, name: str, source: str, license: str) -> Manifest:
    """Count the samples of every tar in a folder and write its manifest.

    Args:
        folder: Folder with ``*.tar`` files.
        name: Name of the set.
        source: The ``source`` its samples will have.
        license: Terms of the set.

    Raises:
        DataError: No tar in the folder, or one that is cut, damaged or empty.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"no *.tar file in {folder}; nothing to index")
    shards = [
        Shard(path=p.name, num_samples=count_samples(p), bytes=p.stat().st_size, sha256=file_sha256(p))
        for p in paths
    ]
    total = sum(shard.num_samples for shard in shards)
    manifest = Manifest(
        folder=folder, name=name, source=source, license=license, num_samples=total, shards=tuple(shards)
    )
    write_manifest(manifest)
    return manifest


def count_samples(path: Path) -> int:
    """Count samples as the reader will group them: runs of members with the same key.

    Raises:
        DataError: The tar is cut, damaged or holds no sample.
    """
    count, current = 0, None
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                match = _MEMBER.fullmatch(member.name)
                if not member.isreg() or match is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                if match[1] != current:
                    count, current = count + 1, match[1]
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"shard {path} is damaged ({error}); copy it again") from error
    with path.open("rb") as stream:
        stream.seek(end)
        if stream.read(len(_END_OF_TAR)) != _END_OF_TAR:
            raise DataError(
                f"shard {path} is cut or damaged after sample {count}: no end-of-archive mark; copy it again"
            )
    if not count:
        raise DataError(f"shard {path} holds no sample; remove it")
    return count


def main(argv: Sequence[str]) -> int:
    """Command line of `prepare index`."""
    parser = argparse.ArgumentParser(prog="prepare index", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", help="folder with *.tar files")
    parser.add_argument("--name", help="name of the set (default: the name of the folder)")
    parser.add_argument("--source", default="cc12m", help="source of its samples (default: %(default)s)")
    parser.add_argument("--license", default="unknown", help="terms of the set (default: %(default)s)")
    given = parser.parse_args(list(argv))
    name = given.name or Path(given.folder).resolve().name
    manifest = index_shards(given.folder, name=name, source=given.source, license=given.license)
    sys.stdout.write(
        f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {given.folder}/{MANIFEST_NAME}\n"
    )
    return 0
