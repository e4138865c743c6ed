"""`checkpoints/last.ckpt`: the state from which an interrupted stage goes on, and on which `test` can be run."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO

from alignvlm_pl.sharded_checkpoint import make_whole, read_folder, replace_path, write_file

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

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / CHECKPOINT)
        self._saved_step = trainer.global_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a full disk or a kill leaves the earlier one as it was.

    Lightning writes to the system's temporary folder instead, from where a move to another disk is a copy. Sharded
    strategies write folders of their own (alignvlm_pl/parallel.py), which are read here for those that are not.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save `checkpoint` at `path`."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_file(checkpoint, partial)
            replace_path(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a file, or the folder of a sharded strategy with its tensors put together."""
        if Path(path).is_dir():
            whole: dict[str, Any] = make_whole(read_folder(Path(path)))
            return whole
        found: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return found
