"""State of a trainer: whether a micro batch ends an optimizer step or one that is logged, and trial runs."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning.pytorch as pl

from alignvlm_pl.errors import AlignVLMError

T = TypeVar("T")


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the micro batch of this index within the epoch ends an optimizer step; for `on_train_batch_end`."""
    done = batch_idx + 1
    last = trainer.is_last_batch or done >= trainer.num_training_batches
    return last or done % trainer.accumulate_grad_batches == 0


def ends_logged_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether that step is one whose metrics are logged (`trainer.log_every_n_steps`); the same on all ranks."""
    step, every = trainer.global_step, cast(int, trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return bool(step and every) and step % every == 0 and ends_step(trainer, batch_idx)


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a trial run (`fast_dev_run`), which writes no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning


def on_one_rank(trainer: pl.Trainer, action: Callable[[], T], rank: int = 0) -> T:
    """Run an action on one rank; return its result, or raise its `AlignVLMError`, on all of them."""
    found: Any = None
    if trainer.global_rank == rank:
        try:
            found = action()
        except AlignVLMError as error:
            found = error
    found = trainer.strategy.broadcast(found, src=rank)
    if isinstance(found, AlignVLMError):
        raise found
    return cast(T, found)
