"""All stages of a recipe are checked before the first begins: what the last one lacks is said at once."""

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor

from callbacks.gain_calibration import GainCalibration
from datamodules.base import WebDataModule

from ..errors import AlignVLMError, ConfigError, nearest
from ..models.build import build_config
from ..models.loading import choose_attention
from ..models.losses import check_loss_backend
from ..models.modeling import AlignVLMForConditionalGeneration
from ..strategies.fsdp import refuse_unknown
from ..training.checkpoint_metadata import check_contract
from ..training.lora import check_adapters
from ..training.module import check_objective
from ..training.optim import check_optimizer
from ..training.stage import Stage
from .lightning_cli import AlignCLI
from .recipe import Run


def check_stages(runs: Sequence[Run]) -> None:
    """Check the stages that are still to run: configuration, datasets, benchmarks, accumulation, strategy, free disk.

    Each rank does so, without weights and samples; what is missing or invalid is in one ConfigError.
    """
    problems: list[str] = []
    exports = 0
    before: _Built | None = None
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the stages log the same when they begin
    try:
        for run in runs:
            found, built = copy_context().run(_check_stage, run.options)
            if built is not None:
                of_model, size = _check_model(built)
                found += of_model + _problems([partial(_check_parent, before, built)] if before else [])
                exports += size
            before = built
            problems += [f"{run.folder}: {problem}" for problem in found]
    finally:
        logging.disable(disabled)
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
    try:
        _Check.run_command(["fit", *options])
    except AlignVLMError as error:
        return [str(error)], None
    except _Built as ended:
        built = ended
    cli, stage, data = built.cli, built.stage, built.cli.datamodule
    benchmark = cli.config_init["fit"]["benchmark"]
    checks = [
        lambda: refuse_unknown(cli.trainer.strategy),
        lambda: check_objective(stage, built.spec.connector),
        lambda: check_optimizer(stage),
        lambda: benchmark.check_readout_sets(getattr(data, "benchmarks", {})),
        lambda: _check_callbacks(cli.trainer, data),
        lambda: check_loss_backend(cli.model.loss_backend, device=cli.trainer.strategy.root_device.type),
    ]
    missing = data.missing() if hasattr(data, "missing") else []
    if not missing:
        checks.append(lambda: _check_batches(cli.trainer, data))
    return _problems(checks) + missing, built


def _problems(checks: Iterable[Callable[[], object]]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except AlignVLMError as error:
            found.append(str(error))
    return found


def _check_model(built: _Built) -> tuple[list[str], int]:
    """Return the problems of a stage's model, and the bytes of its export in float32."""
    module, stage = built.cli.model, built.stage
    try:
        with torch.device("meta"):
            model = AlignVLMForConditionalGeneration(build_config(built.spec, image_token_id=0))
    except AlignVLMError as error:
        return [str(error)], 0
    checks: list[Callable[[], object]] = [lambda: module.processor, lambda: check_adapters(model, stage.adapters)]
    if module.attention is not None:
        checks.append(lambda: choose_attention(model.language_model, module.attention))
    if stage.calibrate:
        checks.append(partial(GainCalibration(**stage.calibrate).check, model))
    return _problems(checks), sum(parameter.numel() * 4 for parameter in model.parameters())


def _check_parent(before: _Built, built: _Built) -> None:
    parent, name = built.stage.parent, before.stage.name
    if parent is not None and parent != name:
        raise ConfigError(f"stage.parent={parent!r}, but the stage before it is {name!r}; change one of them")
    check_contract(before.cli.model.contract, built.cli.model.contract, source=f"stage {name!r}")


def _check_callbacks(trainer: pl.Trainer, data: Any) -> None:
    """Check what Lightning's callbacks look at, as far as it follows from the configuration."""
    known = {f"val/{name}/loss" for name in getattr(data, "val", {})}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning
        monitor = str(getattr(callback, "monitor", None) or "")
        if known and re.fullmatch("val/.*/loss", monitor) and monitor not in known:
            raise ConfigError(f"{type(callback).__name__}: monitor={monitor!r}; {nearest(monitor, known)}")
        if isinstance(callback, LearningRateMonitor) and not trainer.loggers:
            raise ConfigError("LearningRateMonitor needs a logger: set trainer.logger, or leave the callback out")


def _check_batches(trainer: pl.Trainer, data: Any) -> None:
    """Check that limits and intervals leave batches to train on and to validate on, as Lightning does when it loads.

    Of packed rows and of other DataModules the number of batches is not known here.
    """
    if not isinstance(data, WebDataModule):
        return
    ranks, interval = trainer.num_devices * trainer.num_nodes, trainer.val_check_interval
    if not data.token_budget and data.train:
        found = data.steps_per_epoch(world_size=ranks)
        found = found - found % trainer.accumulate_grad_batches or found
        batches = _limited("limit_train_batches", trainer.limit_train_batches, found)
        each_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        if isinstance(interval, int) and interval > batches and each_epoch:
            raise ConfigError(
                f"trainer.val_check_interval={interval}: an epoch has {batches} batches; give a smaller number, or "
                "trainer.check_val_every_n_epoch=null to count over epochs"
            )
    for samples in data.validation_samples().values():
        _limited("limit_val_batches", trainer.limit_val_batches, -(-samples // (data.eval_batch_size * ranks)))


def _limited(name: str, limit: float, batches: int) -> int:
    """Return how many of a loader's batches a limit leaves: a number of batches, or as a float a share of them."""
    if isinstance(limit, int):
        return min(limit, batches)
    if limit > 0 and int(limit * batches) == 0:
        raise ConfigError(
            f"trainer.{name}={limit} of {batches} batches is none; give at least {1 / max(batches, 1):.3g}, or an "
            "integer"
        )
    return int(limit * batches)
