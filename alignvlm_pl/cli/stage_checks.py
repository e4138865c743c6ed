"""All stages of a recipe are checked before the first begins: what the last one lacks is said at once."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

from callbacks.gain_calibration import GainCalibration

from ..errors import AlignVLMError, ConfigError
from ..strategies.fsdp import refuse_unknown
from ..training.module import check_objective
from ..training.optim import check_optimizer
from ..training.stage import Stage
from .lightning_cli import AlignCLI
from .recipe import Run


def check_stages(runs: Sequence[Run]) -> None:
    """Check the stages that are still to run: configuration, datasets, benchmarks, accumulation, strategy, free disk.

    Each rank does so; neither weights nor samples are read.

    Raises:
        ConfigError: Something is missing or invalid; one message with all of it.
    """
    problems: list[str] = []
    models: dict[str, Any] = {}
    exports = 0
    with _quiet():
        for run in runs:
            found, built = copy_context().run(_check_stage, run.options)
            if built is not None:
                try:
                    key = repr(built.spec)
                    model = models[key] = models.get(key) or _on_meta(built.spec)
                    exports += sum(parameter.numel() * 4 for parameter in model.parameters())
                    if built.stage.calibrate:
                        GainCalibration(**built.stage.calibrate).check(model)
                except AlignVLMError as error:
                    found.append(str(error))
            problems += [f"{run.folder}: {problem}" for problem in found]
    folder = next((run.folder for run in runs if run.folder is not None and run.folder.exists()), Path())
    free = shutil.disk_usage(folder).free
    if exports > free:
        problems.append(
            f"{folder}: {free / 1e9:.1f} GB are free, the exports of {len(runs)} stages take {exports / 1e9:.1f} GB; "
            "free some space or set another run_dir"
        )
    if problems:
        listing = "".join(f"\n- {problem}" for problem in dict.fromkeys(problems))
        raise ConfigError(f"no stage was started, because of {len(problems)} problem(s):{listing}")


class _Built(Exception):  # no error: it ends a check
    """A stage's model, data and trainer are built."""

    def __init__(self, cli: AlignCLI, stage: Stage) -> None:
        super().__init__()
        self.cli, self.stage, self.spec = cli, stage, cli.model.spec


class _Check(AlignCLI):
    """Build the objects of a stage, without weights, and stop."""

    def _own(self, run_dir: Path) -> None:
        """Leave the folder to the run itself, which says if it has another owner."""

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        raise _Built(self, self._stage())


def _check_stage(options: list[str]) -> tuple[list[str], _Built | None]:
    """Return the problems of a stage, and what was built of it."""
    try:
        _Check.run_command(["fit", *options])
    except AlignVLMError as error:
        return [str(error)], None
    except _Built as ended:
        built = ended
    cli, stage, found = built.cli, built.stage, []
    data = cli.datamodule
    benchmark = cli.config_init["fit"]["benchmark"]
    checks = [
        lambda: refuse_unknown(cli.trainer.strategy),
        lambda: check_objective(stage, built.spec.connector),
        lambda: check_optimizer(stage),
        lambda: benchmark.check_readout_sets(getattr(data, "benchmarks", {})),
    ]
    for check in checks:
        try:
            check()
        except AlignVLMError as error:
            found.append(str(error))
    if hasattr(data, "missing"):
        found += data.missing()
    return found, built


def _on_meta(spec: Any) -> Any:
    """Build a model without weights."""
    import torch

    from ..models.build import build_config
    from ..models.modeling import AlignVLMForConditionalGeneration

    config = build_config(spec, image_token_id=0)
    with torch.device("meta"):
        return AlignVLMForConditionalGeneration(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing within: the stages log the same when they begin."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
