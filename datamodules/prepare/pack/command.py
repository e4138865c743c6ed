"""What every `prepare <source>` command shares: its options, the packing, and what is printed at the end.

Scripts that call `pack` with several workers need Python's usual `if __name__ == "__main__":`.
"""

import argparse
import sys

from ...shards.manifest import Manifest
from .engine import REPORT_NAME, Engine
from .options import PackOptions, add_options
from .source import RawData

__all__ = ["add_options", "pack", "print_yield"]


def pack(raw: RawData, options: PackOptions | argparse.Namespace) -> Manifest:
    """Write raw data as globally shuffled shards.

    Args:
        raw: The data.
        options: The settings, or what a parser with `add_options` has parsed.

    Returns:
        The manifest of the new set.

    Raises:
        ConfigError: Settings are wrong or do not fit the data.
        DataError: The data is unusable, with `strict` a bad row, the disk too small, or the set is there already.
    """
    return Engine(raw, options if isinstance(options, PackOptions) else PackOptions.of(options)).run()


def print_yield(manifest: Manifest) -> None:
    """Print what was written and what became of the rest (the fields are those of `Engine`)."""
    extra = manifest.extra
    lines = [f"{manifest.num_samples} samples in {len(manifest.shards)} shards: {manifest.folder}"]
    lines += [f"  {source}: {number}" for source, number in sorted(manifest.sources.items())]
    lines.append(f"read: {extra['read']} rows")
    lines += [f"left out: {count} ({reason})" for reason, count in extra["skipped"].items()]
    pictures = extra["pictures"]
    lines.append(
        f"pictures: {pictures['stored']}, {pictures['distinct']} of them distinct, {pictures['in_several_samples']} in "
        "several samples"
    )
    if extra["repeated_ids"]:
        lines.append(f"repeated ids: {extra['repeated_ids']}")
    overlap = extra["benchmark_overlap"]
    if overlap["compared_with"]:
        state = "left out" if overlap["dropped"] else "kept"
        lines.append(f"samples with a picture like one of a benchmark: {overlap['samples']} ({state})")
    lines.append(f"details: {manifest.where(REPORT_NAME)}")
    sys.stdout.write("\n".join(lines) + "\n")
