"""`describe`: print the metadata of a checkpoint or an export; weights are not read."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def run(argv: list[str]) -> int:
    """Print JSON: stage and settings, parent, samples seen, model, processor, versions; and a checkpoint's step."""
    parser = argparse.ArgumentParser(prog="alignvlm describe", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or the hf folder that a finished stage leaves")
    sys.stdout.write(json.dumps(describe(parser.parse_args(argv[1:]).path), indent=2) + "\n")
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Return the description of a checkpoint or folder; a CheckpointError if it does not describe itself."""
    from ..strategies.sharded_checkpoint import is_folder, read_rest
    from ..training.checkpoint_metadata import CONTENTS
    from ..training.export import read_record

    if path.is_dir() and not is_folder(path):
        return read_record(path)
    checkpoint = read_rest(path)
    if CONTENTS not in checkpoint:
        raise CheckpointError(
            f"checkpoint {path} does not say what it is: expected {CONTENTS!r} in it; another program's?"
        )
    return {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"], **checkpoint[CONTENTS]}
