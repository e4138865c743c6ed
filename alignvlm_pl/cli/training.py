"""`fit`, `validate`, `test` and `predict`: one run of LightningCLI, or one for each stage of a recipe."""

import gc
import os
import sys
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path

from ..utils.stop_signals import listening
from .recipe import Run, plan_runs


def run(argv: list[str]) -> int:
    """Run a subcommand of LightningCLI, or one fit for each stage; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command, options = argv[0], argv[1:]
    if command == "fit":
        with listening():
            return _fit(options)
    from .lightning_cli import AlignCLI

    try:
        AlignCLI.run_command([command, *options])
    except SystemExit as ended:  # Lightning exits with 1
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    return 0


def _fit(options: list[str]) -> int:
    planned = plan_runs(options)
    if len(planned) > 1 and any(option.startswith("--print_config") for option in options):
        return _print_configs(planned)
    from callbacks.preemption import Preempted

    from .stage_checks import check_stages

    left = [run for run in planned if run.folder is None or not _finished(run.folder)]
    if len(left) > 1:
        check_stages(left)
    try:
        for run in planned:
            if run.folder is not None and _finished(run.folder):
                print(f"stage in {run.folder} is finished", flush=True)
                continue
            # The parser keeps what it has built in context variables: in a context of its own, model and optimizer of a
            # stage are freed before the next one builds its own.
            another_follows = run is not planned[-1]
            copy_context().run(_fit_stage, run.options, another_follows=another_follows)
            gc.collect()
    except Preempted as preempted:
        return preempted.code
    return 0


def _print_configs(runs: list[Run]) -> int:
    """Print the configuration of each stage, as YAML documents."""
    from .lightning_cli import AlignCLI

    for number, run in enumerate(runs, start=1):
        print(f"--- # stage {number} of {len(runs)}, in {run.folder}", flush=True)
        with suppress(SystemExit):  # the parser prints and exits
            AlignCLI.run_command(["fit", *run.options])
    return 0


def _fit_stage(options: list[str], *, another_follows: bool) -> None:
    from .lightning_cli import AlignCLI

    done = AlignCLI.run_command(["fit", *options])
    if another_follows:
        done.preemption.leave_if_requested(done.trainer)


def _finished(folder: Path) -> bool:
    from ..training.export import EXPORT_FOLDER, RECORD

    return (folder / EXPORT_FOLDER / RECORD).is_file()
