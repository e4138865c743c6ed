"""Settings of a packing, the same for every source."""

import argparse
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from alignvlm_pl.errors import ConfigError

from ...shards.writer import MAX_SHARD_BYTES

_MANY = 8
"""Processes by default, where the machine has so many processors."""


def default_workers() -> int:
    """Return the number of processes where none is asked for."""
    return min(os.cpu_count() or 1, _MANY)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """What decides about the shards, apart from the data.

    Attributes:
        out: Folder for the shards.
        name: Name of the set, the stem of shards and keys; None for the name of the folder.
        license: Terms of the set; None for those of the data.
        source: ``source`` of samples that name none; None for that of the data.
        seed: Seed of the global shuffle.
        samples_per_shard: Samples after which a new shard begins.
        shard_bytes: Bytes that a shard is not to exceed, unless by a single sample.
        workers: Processes; they change nothing but the time.
        limit: Read only so many rows, the first ones; None for all.
        strict: The first bad row or repeated id is an error.
        overwrite: Replace a finished set in `out`.
        overlap_with: Benchmarks, as sets of shards or folders of pictures, whose pictures are looked for.
        drop_overlap: Leave out samples with such a picture.
    """

    out: Path
    name: str | None = None
    license: str | None = None
    source: str | None = None
    seed: int = 0
    samples_per_shard: int = 512
    shard_bytes: int = MAX_SHARD_BYTES
    workers: int = 1
    limit: int | None = None
    strict: bool = False
    overwrite: bool = False
    overlap_with: tuple[Path, ...] = ()
    drop_overlap: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for settings that cannot be."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.set_name):
            raise ConfigError(
                f"name of the set: expected letters, digits, '_' and '-', found {self.set_name!r}; give it with --name"
            )
        for name in ("samples_per_shard", "shard_bytes", "workers", "limit"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected 1 or more, found {number}")
        if self.drop_overlap and not self.overlap_with:
            raise ConfigError(
                "--drop-overlap needs --overlap-with: the benchmarks whose pictures are dropped"
            )

    @property
    def set_name(self) -> str:
        """Name of the set."""
        return self.name or self.out.resolve().name

    @classmethod
    def of(cls, namespace: argparse.Namespace) -> "PackOptions":
        """Take the settings from what `add_options` parsed; other attributes are left alone."""
        given = {field.name: getattr(namespace, field.name) for field in fields(cls)}
        return cls(**given | {"out": Path(given["out"]), "overlap_with": tuple(given["overlap_with"])})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a command, with the folder `out` as a positional argument."""
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--name", help="name of the set (default: the name of the output folder)")
    parser.add_argument("--license", help="terms of the set (default: what is known of the data)")
    parser.add_argument("--source", help="source of rows that name none (default: what is known of the data)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the global shuffle (default: %(default)s)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--shard-bytes", type=int, default=MAX_SHARD_BYTES, help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes; the shards do not depend on it (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="read at most this many rows, the first ones")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row or repeated id")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished set")
    parser.add_argument(
        "--overlap-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="report pictures that benchmarks hold too: sets of shards, or folders of pictures",
    )
    parser.add_argument("--drop-overlap", action="store_true", help="leave out samples with such pictures")
