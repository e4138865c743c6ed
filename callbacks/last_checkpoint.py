"""`checkpoints/last.ckpt`: the state from which an interrupted stage goes on, and on which `test` can be run."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Path below the run folder."""


class LastCheckpoint(pl.Callback):
    """Keep the newest training state, written every n steps and when training ends.

    CONTRACT: alignvlm_pl/cli/lightning_cli.py puts this before `StageTransition`, whose folder marks the stage as
    finished and must therefore be written last.

    Args:
        every_n_steps: Interval in optimizer steps.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n optimizer steps."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the stage, or where it was interrupted."""
        if not trainer.interrupted and trainer.global_step != self._saved_step:
            self._save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save this step, unless it is saved; all ranks must call it."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / CHECKPOINT)
        self._saved_step = trainer.global_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a full disk or a kill leaves the earlier one as it was.

    Lightning writes to the system's temporary folder instead, from where a move to another disk is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save `checkpoint` at `path`."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            # Where a write is refused, torch's own archive writer fails as well and hides the reason.
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
