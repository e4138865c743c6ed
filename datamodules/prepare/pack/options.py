"""Settings of `pack`, the same for every source."""

import argparse
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError

from ...shards.writer import MAX_SHARD_BYTES

DEFAULT_WORKERS = min(os.cpu_count() or 1, 8)


def _option(value: Any, help: str, **settings: Any) -> Any:
    """Return a field that `add_options` makes an option of a command, with settings of `add_argument`."""
    return field(default=value, metadata={"help": help, **settings})


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """Settings that determine the shards, besides the data; raises ConfigError for invalid ones."""

    out: Path
    name: str = _option("", "name of the dataset (default: the name of the output folder)")
    license: str = _option("", "terms of the dataset (default: that of the data)")
    source: str = _option("", "source of rows that name none (default: that of the data)")
    seed: int = _option(0, "seed of the global shuffle (default: %(default)s)", type=int)
    samples_per_shard: int = _option(512, "samples after which a new shard begins (default: %(default)s)", type=int)
    shard_bytes: int = _option(
        MAX_SHARD_BYTES, "most bytes of a shard, unless a single sample is larger (default: %(default)s)", type=int
    )
    workers: int = _option(
        1, "processes; the shards do not depend on it (default: %(default)s)", type=int, default=DEFAULT_WORKERS
    )
    limit: int | None = _option(None, "read at most this many rows, the first ones that are wanted", type=int)
    strict: bool = _option(False, "stop at the first invalid row or repeated id", action="store_true")
    overwrite: bool = _option(False, "replace a finished dataset", action="store_true")
    overlap_with: tuple[Path, ...] = _option(
        (),
        "report images that occur in these benchmarks too: datasets, or folders of images",
        type=Path,
        nargs="+",
        metavar="FOLDER",
    )
    drop_overlap: bool = _option(False, "skip samples with such images", action="store_true")

    def __post_init__(self) -> None:
        name = self.name or self.out.resolve().name
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"name of the dataset: expected letters, digits, '_' and '-', found {name!r}; set it with --name"
            )
        object.__setattr__(self, "name", name)
        numbers = {key: getattr(self, key) for key in ("samples_per_shard", "shard_bytes", "workers", "limit")}
        require_at_least(1, **numbers)
        if self.drop_overlap and not self.overlap_with:
            raise ConfigError("--drop-overlap needs --overlap-with: the benchmarks whose images are dropped")

    @classmethod
    def from_args(cls, namespace: argparse.Namespace) -> "PackOptions":
        """Return the settings that `add_options` parsed; other attributes of the namespace are ignored."""
        given = {option.name: getattr(namespace, option.name) for option in fields(cls)}
        return cls(**given | {"overlap_with": tuple(given["overlap_with"])})


def require_at_least(least: int, **numbers: int | None) -> None:
    """Raise ConfigError where an option, by its name with underscores, is a smaller number; None is not set."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ConfigError(f"--{name.replace('_', '-')}: expected {least} or more, found {number}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings to a command, with the folder `out` as a positional argument."""
    parser.add_argument("out", type=Path, help="folder for the shards")
    for option in fields(PackOptions):
        if option.metadata:
            flag = f"--{option.name.replace('_', '-')}"
            parser.add_argument(flag, **{"default": option.default, **option.metadata})
