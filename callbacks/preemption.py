"""Stopping on request: all ranks agree at a step's end, save, and leave with a status of their own.

Lightning's own way saves inside the signal handler, one rank alone, in the middle of a collective; it is switched off.
"""

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.utils.stop_signals import EXIT_CODE, received

from .last_checkpoint import LastCheckpoint

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has saved and leaves.

    Args:
        status: Exit status of this process.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Preemption(pl.Callback):
    """Save and leave when SIGUSR1 or SIGTERM has come to any rank.

    The ranks agree by one reduction of a flag. They do at the end of every n-th optimizer step, after each batch of a
    validation or a benchmark, and where a fit begins and ends; so a rank that got no signal leaves with the others.
    What is left is run again from its beginning when the run goes on (stage_loop.py, benchmark_evaluation.py).

    CONTRACT: alignvlm_pl/cli/lightning_cli.py puts this behind every callback that has something to do at a step's end,
    which would be lost, and before `StageTransition`, which would mark the stage as finished.

    Args:
        last: Writes the checkpoint.
        every_n_steps: Optimizer steps between two looks.

    Raises:
        ConfigError: `every_n_steps` is less than 1.
    """

    def __init__(self, last: LastCheckpoint, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"preemption_every_n_steps={every_n_steps}: expected at least 1")
        self._last = last
        self.every_n_steps = every_n_steps
        self._agreed = False
        self._first_step = 0

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether any rank has been asked to stop; all ranks must call it."""
        if not self._agreed:
            self._agreed = trainer.strategy.reduce_boolean_decision(received() is not None, all=False)
        return self._agreed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Switch Lightning's handlers off: that of SIGTERM broadcasts, whatever the other ranks are doing."""
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave before anything is trained if the request came while the stage was being built."""
        if self.asked(trainer):
            self._leave(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what needs no saving, the steps of the checkpoint this run goes on from; leave if asked by now."""
        self._first_step = trainer.global_step
        if self.asked(trainer):
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave at the end of an optimizer step."""
        if trainer.fit_loop._should_accumulate():
            return
        if self._agreed or (trainer.global_step % self.every_n_steps == 0 and self.asked(trainer)):
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs them behind this hook
            self._save_and_leave(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the step before this validation and leave; between two micro batches of a step it is run to its end."""
        if (trainer.sanity_checking or not trainer.fit_loop._should_accumulate()) and self.asked(trainer):
            self._save_and_leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave before the stage-end folder is written; `LastCheckpoint` has saved the last step."""
        if self.asked(trainer):
            self._leave(trainer)

    def _save_and_leave(self, trainer: pl.Trainer) -> None:
        if trainer.global_step != self._first_step:
            self._last.save(trainer)
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        """End this rank, once all have come here.

        Raises:
            Preempted: Always.
        """
        if trainer.is_global_zero:
            log.info("asked to stop%s: left after step %d", _by(), trainer.global_step)
        # A scheduler that sees a rank end may kill the others.
        trainer.strategy.barrier("preempted")
        raise Preempted(_status(trainer))


def leave_between_stages(trainer: pl.Trainer) -> None:
    """Leave where a stage is finished and the next one has not begun.

    Args:
        trainer: That of the finished stage.

    Raises:
        Preempted: Any rank has been asked to stop.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning, unknown to its types
        if isinstance(callback, Preemption) and callback.asked(trainer):
            callback._leave(trainer)


def _status(trainer: pl.Trainer) -> int:
    # Where Lightning has started the other ranks itself, it kills the first one when another's status is not 0.
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if isinstance(environment, LightningEnvironment) and trainer.local_rank else EXIT_CODE


def _by() -> str:
    return f" by {received()}" if received() else " through another rank"


def _nothing() -> None:
    """Stand in for what is switched off."""
