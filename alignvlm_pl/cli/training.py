"""`fit`, `validate`, `test` and `predict`: one run of LightningCLI, or one for each stage of a recipe."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

from ..utils.stop_signals import listening
from .recipe import plan_runs


def run(argv: list[str]) -> int:
    """Run a subcommand of LightningCLI; a recipe with `stages` becomes one fit after the other.

    Returns:
        Exit status: 0, or that of a fit which was asked to stop and has saved.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin at barriers make a CPU run several times slower as soon as another process wants a core.
    # CONTRACT: set before torch loads its OpenMP runtime, which reads it once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command, options = argv[0], argv[1:]
    if command == "fit":
        with listening():
            return _fit(options)
    from .lightning_cli import AlignCLI

    AlignCLI.run_command([command, *options])
    return 0


def _fit(options: list[str]) -> int:
    planned = plan_runs(options)
    from callbacks.preemption import Preempted, leave_between_stages

    from .lightning_cli import AlignCLI

    try:
        for run in planned:
            if run.folder is not None and _finished(run.folder):
                print(f"stage in {run.folder} is finished; going on with the next", flush=True)
                continue
            done = AlignCLI.run_command(["fit", *run.options])
            done.trainer.strategy.barrier(
                "stage over"
            )  # the others wait while rank 0 writes the stage-end folder
            if run is not planned[-1]:
                leave_between_stages(done.trainer)
                _let_go(done)
    except Preempted as left:
        return left.status
    return 0


def _let_go(done: Any) -> None:
    """Free model and optimizer of a stage: the next one builds its own, and the parser keeps the stage's run."""
    strategy = done.trainer.strategy
    strategy.optimizers, strategy.lr_scheduler_configs, strategy._model = [], [], None
    done.model._modules.clear()
    gc.collect()


def _finished(folder: Path) -> bool:
    from ..training.export import RECORD

    return (folder / "hf" / RECORD).is_file()
