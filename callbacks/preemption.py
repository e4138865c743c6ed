"""Preemption: a signal on any rank ends the run after a step, with a checkpoint.

The exit status is 85 after SIGUSR1 or SIGTERM of a scheduler, 130 after Ctrl-C (SIGINT) or a closed terminal (SIGHUP).
"""

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment

from alignvlm_pl.errors import require_at_least
from alignvlm_pl.utils import stop_signals
from alignvlm_pl.utils.collectives import any_ranks, gather
from alignvlm_pl.utils.stop_signals import exit_status, hold_back, listen_again, received, release

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has saved and ends with the exit status `code`."""

    code: int


class Preemption(pl.Callback):
    """End the run after a checkpoint when any rank has received one of `stop_signals.SIGNALS`.

    The ranks reduce their flags at the end of every n-th optimizer step and after each batch of a validation, and set
    `leaving`. `LastCheckpoint`, which runs behind all other callbacks, then saves, and the next hook that begins
    something raises `Preempted`. The resumed run skips a validation that was cut off or due; the log says so.

    Lightning's SIGTERM handler, which starts a broadcast whatever the other ranks do, is installed right before
    training and replaced where training begins; in between the signals are blocked. `every_n_steps` is at least 1.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        require_at_least(1, "preemption_", every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.leaving = False
        self.is_time_to_save: Callable[[], bool] = lambda: False
        """By the clock of this process; rank 0's is agreed on with the flags."""
        self.save_due = False  # Whether it was time for rank 0 at the last reduction
        self._step = 0
        self._within_step = False

    def requested(self, trainer: pl.Trainer) -> bool:
        """Whether any rank has received a signal; all ranks must call it."""
        if not self.leaving:
            own = (received() is not None, trainer.is_global_zero and self.is_time_to_save())
            device = trainer.strategy.root_device
            self.leaving, self.save_due = any_ranks(own, world_size=trainer.world_size, device=device)
        return self.leaving

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hold_back()
        self.leave_if_requested(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        listen_again()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        listen_again()
        self._step = trainer.global_step
        stop_signals.progress = self._step, self._step
        self.leave_if_requested(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.leaving:
            self.leave(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save_due = False
        self._within_step = trainer.global_step == self._step
        if not self._within_step:
            self._step = trainer.global_step
            stop_signals.progress = self._step, stop_signals.progress[1]
            if self._step % self.every_n_steps == 0:
                self.requested(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.leaving:
            self._skip_validation(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """Reduce the flags within a validation, but not between two micro batches of a step, where nothing is saved."""
        if not self._within_step:
            self.requested(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self.leaving:
            self._skip_validation(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        release()

    def leave_if_requested(self, trainer: pl.Trainer) -> None:
        """Raise `Preempted` if any rank has received a signal, where nothing is to be saved; all ranks must call it."""
        if self.requested(trainer):
            self.leave(trainer)

    def leave(self, trainer: pl.Trainer) -> None:
        # Also a barrier: a scheduler that sees a rank end may kill the others.
        names = list(filter(None, gather(received())))
        if trainer.is_global_zero:
            by = f" by {received()}" if received() else " through another rank"
            log.info("asked to stop%s: left after step %d", by, trainer.global_step)
        # Where Lightning has started the other ranks itself, it kills the first one when another's status is not 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        silent = isinstance(environment, LightningEnvironment) and trainer.local_rank
        raise Preempted(0 if silent else exit_status(names))

    def _skip_validation(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            log.warning("validation after step %d is skipped: the run resumes behind it", trainer.global_step)
        self.leave(trainer)
