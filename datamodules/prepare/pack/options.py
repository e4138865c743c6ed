"""Settings of `pack`, the same for every source."""

import argparse
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from alignvlm_pl.errors import ConfigError

from ...shards.writer import MAX_SHARD_BYTES

DEFAULT_WORKERS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """Settings that determine the shards, besides the data.

    Attributes:
        out: Folder for the shards.
        name: Name of the dataset, the stem of shards and keys; None for the name of the folder.
        license: Terms of the dataset; None for those of the data.
        source: ``source`` of samples that name none; None for that of the data.
        seed: Seed of the global shuffle.
        samples_per_shard: Samples after which a new shard begins.
        shard_bytes: Most bytes of a shard, unless a single sample is larger.
        workers: Processes; the result does not depend on them.
        limit: Read the first rows only, this many; None for all.
        strict: The first invalid row or repeated id is an error.
        overwrite: Replace a finished dataset in `out`.
        overlap_with: Benchmarks, as datasets or folders of images, whose images are looked for.
        drop_overlap: Skip samples with such an image.
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
        """Raise ConfigError for invalid settings."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.dataset_name):
            raise ConfigError(
                f"name of the dataset: expected letters, digits, '_' and '-', found {self.dataset_name!r}; set it with "
                "--name"
            )
        numbers = {name: getattr(self, name) for name in ("samples_per_shard", "shard_bytes", "workers", "limit")}
        require_at_least(1, **numbers)
        if self.drop_overlap and not self.overlap_with:
            raise ConfigError("--drop-overlap needs --overlap-with: the benchmarks whose images are dropped")

    @property
    def dataset_name(self) -> str:
        """Name of the dataset."""
        return self.name or self.out.resolve().name

    @classmethod
    def from_args(cls, namespace: argparse.Namespace) -> "PackOptions":
        """Return the settings that `add_options` parsed; other attributes of the namespace are ignored."""
        given = {field.name: getattr(namespace, field.name) for field in fields(cls)}
        return cls(**given | {"out": Path(given["out"]), "overlap_with": tuple(given["overlap_with"])})


def require_at_least(least: int, **numbers: int | None) -> None:
    """Raise ConfigError where an option, by its name with underscores, is a smaller number; None is not set."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ConfigError(f"--{name.replace('_', '-')}: expected {least} or more, found {number}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a command, with the folder `out` as a positional argument."""
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--name", help="name of the dataset (default: the name of the output folder)")
    parser.add_argument("--license", help="terms of the dataset (default: that of the data)")
    parser.add_argument("--source", help="source of rows that name none (default: that of the data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the global shuffle (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--shard-bytes", type=int, default=MAX_SHARD_BYTES, help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=DEFAULT_WORKERS,
        help="processes; the shards do not depend on it (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="read at most this many rows, the first ones")
    parser.add_argument("--strict", action="store_true", help="stop at the first invalid row or repeated id")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    parser.add_argument(
        "--overlap-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="report images that occur in these benchmarks too: datasets, or folders of images",
    )
    parser.add_argument("--drop-overlap", action="store_true", help="skip samples with such images")
