"""Where training is: at the end of an optimizer step, and of one that is logged."""

from typing import cast

import lightning.pytorch as pl


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step was taken after this micro batch; for `on_train_batch_end`.

    Args:
        trainer: The trainer that runs.
        batch_idx: Index of the micro batch within the epoch.
    """
    done = batch_idx + 1
    last = trainer.is_last_batch or done >= trainer.num_training_batches
    return last or done % trainer.accumulate_grad_batches == 0


def ends_logged_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether that step is one whose metrics are logged (`trainer.log_every_n_steps`); the same on all ranks."""
    step, every = trainer.global_step, cast(int, trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return bool(step and every) and step % every == 0 and ends_step(trainer, batch_idx)
