"""`fit`, `validate`, `test` and `predict`: one run of LightningCLI, or one for each stage of a recipe."""

import os
import sys
from pathlib import Path

from .recipe import Run, plan_runs


def run(argv: list[str]) -> int:
    """Run a subcommand of LightningCLI; a recipe with `stages` becomes one fit after the other."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin at barriers make a CPU run several times slower as soon as another process wants a core.
    # CONTRACT: set before torch loads its OpenMP runtime, which reads it once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from .lightning_cli import AlignCLI

    command, options = argv[0], argv[1:]
    for planned in plan_runs(options) if command == "fit" else [Run(options=options)]:
        if planned.folder is not None and _finished(planned.folder):
            print(f"stage in {planned.folder} is finished; going on with the next", flush=True)
            continue
        AlignCLI.run_command([command, *planned.options])
    return 0


def _finished(folder: Path) -> bool:
    from ..checkpoint import RECORD

    return (folder / "hf" / RECORD).is_file()
