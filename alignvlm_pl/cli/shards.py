"""`shards verify`: is a set of shards whole? See `datamodules.verify`."""

import sys

from ..errors import ConfigError, nearest

KINDS = {"verify": "find every damage of sets of shards, with shard, member and offset"}


def run(argv: list[str]) -> int:
    """Pass the options on; nothing here loads torch."""
    from datamodules.verify import main

    kind = argv[1] if len(argv) > 1 else "--help"
    if kind in ("-h", "--help"):
        sys.stdout.write("usage: shards <kind> [options], `shards <kind> --help` for its options\n\n")
        for name, summary in KINDS.items():
            sys.stdout.write(f"  {name:10s} {summary}\n")
        return 0
    if kind not in KINDS:
        raise ConfigError(f"shards: unknown kind {kind!r}; {nearest(kind, KINDS)}")
    return main(argv[2:])
