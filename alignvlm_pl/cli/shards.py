"""`shards verify|info|preview`: check datasets, count their samples, and show what a model is trained on"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, require_known

if TYPE_CHECKING:
    from datamodules.shards.info import Model

KINDS = {
    "verify": "find every damage of datasets, with shard, member and offset",
    "info": "count samples by source; sizes, lengths and, for a model, tokens",
    "preview": "a page of samples as a model is trained on them",
}


def run(argv: list[str]) -> int:
    """Pass the options on; torch is loaded only where a model counts tokens."""
    if len(argv) < 2:
        raise ConfigError(f"shards: a kind is missing; there are {', '.join(KINDS)}")
    kind = argv[1]
    if kind in ("-h", "--help"):
        sys.stdout.write("usage: shards <kind> [options], `shards <kind> --help` for its options\n\n")
        for name, summary in KINDS.items():
            sys.stdout.write(f"  {name:10s} {summary}\n")
        return 0
    require_known(kind, KINDS, f"shards: unknown kind {kind!r}")
    if kind == "info":
        from datamodules.shards.info import main as info

        return info(argv[2:], load_model)
    if kind == "preview":
        from .preview import main
    else:
        from datamodules.shards.verify import main
    return main(argv[2:])


def load_model(path: Path) -> "Model":
    """Make the counters of a model out of its config, without its weights."""
    from datamodules.shards.info import Model

    from ..models.build import build_processor
    from .params import read_spec

    processor = build_processor(read_spec(path))

    def count_tokens(text: str) -> int:
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    return Model(count_tokens=count_tokens, tiling=processor.geometry, tokens_per_tile=processor.tokens_per_tile)
