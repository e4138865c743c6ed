"""`checkpoints/`: from which an interrupted stage resumes, a finished one is exported, and `test` can be run.

`step00000500.ckpt` is the checkpoint after 500 optimizer steps, `last.ckpt` a link to the newest. A checkpoint is
written whole before the link moves to it, and only then are older ones removed: whenever a run dies, and wherever the
disk is full, `last.ckpt` is a whole checkpoint. The same holds for one that is a folder of shards.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.utils.atomic_files import PARTIAL, atomic_path

from .preemption import Preemption

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Path below the run folder."""

_NAME = "step{:08d}.ckpt"
_WRITTEN = re.compile(r"step(\d{8})\.ckpt")


class LastCheckpoint(Checkpoint):
    """Keep the newest checkpoints of a run, written every n steps, where it is preempted, and after the last step.

    It is one of Lightning's `Checkpoint` callbacks, which run behind all others; a `ModelCheckpoint` of a configuration
    works beside it. It is no `ModelCheckpoint` itself: that replaces its link `last.ckpt` in two steps, cannot save
    where a run is preempted, and forgets what is there when a run folder is moved.

    Args:
        preemption: Says whether the run is about to leave.
        every_n_steps: Interval in optimizer steps.
        keep_last: How many of the newest checkpoints are kept.
        keep_every_n_steps: Keep the checkpoints of these steps as well, for good; None: none.

    Raises:
        ConfigError: An interval is not positive, or no checkpoint falls on `keep_every_n_steps`.
    """

    def __init__(
        self,
        preemption: Preemption,
        every_n_steps: int,
        *,
        keep_last: int = 1,
        keep_every_n_steps: int | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if value < 1:
                raise ConfigError(f"checkpoint_{name}={value}: expected at least 1")
        if keep_every_n_steps is not None and (keep_every_n_steps < 1 or keep_every_n_steps % every_n_steps):
            raise ConfigError(
                f"checkpoint_keep_every_n_steps={keep_every_n_steps}: expected a multiple of "
                f"checkpoint_every_n_steps={every_n_steps}, or null"
            )
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.path: Path | None = None  # the newest, or the one that the run resumed from
        self._preemption = preemption
        self._saved_step = 0  # a run without a step has nothing to save

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never write again over the checkpoint that the run resumes from."""
        self._saved_step = int(checkpoint["global_step"])
        self.path = Path(str(trainer.ckpt_path))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what a killed run left half-written, and check that the disk has room.

        Raises:
            CheckpointError: It has not; naming the free space and what is needed. On all ranks.
        """
        problem = None
        if trainer.is_global_zero:
            problem = self._prepare(trainer, pl_module)
        if (problem := trainer.strategy.broadcast(problem)) is not None:
            raise CheckpointError(problem)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        folder = _folder(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._prune(trainer)
            return _no_room(folder, self._bytes_to_come(folder, pl_module))
        except OSError as error:
            return _unwritable(folder, error)

    def _bytes_to_come(self, folder: Path, module: pl.LightningModule) -> int:
        """What the newest checkpoints, one written beside them and the export take on top of what is there."""
        averaged = bool(getattr(getattr(module, "stage", None), "ema_decay", None))
        steps = [int(found[1]) for path in folder.iterdir() if (found := _WRITTEN.fullmatch(path.name))]
        there = sum(1 for step in steps if not self._is_kept(step))
        count = max(self.keep_last + 1 - there, 1)
        size = checkpoint_bytes(module, averaged=averaged)
        return count * size + _bytes(module, trained=True) + _bytes(module, trained=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n optimizer steps, after the last one, and before the run leaves."""
        due = trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps
        if due or self._preemption.leaving:
            self.save(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        """Save the step before this validation if the run is about to leave."""
        if self._preemption.leaving and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of training."""
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the state of this step, once; all ranks must call it, between two optimizer steps.

        Raises:
            CheckpointError: The folder could not be written; on all ranks.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = _folder(trainer) / _NAME.format(step)
        trainer.save_checkpoint(path)
        problem = None
        if trainer.is_global_zero:
            try:
                _point(trainer, path)
                self._prune(trainer)
            except OSError as error:
                problem = _unwritable(path.parent, error)
        if (problem := trainer.strategy.broadcast(problem)) is not None:
            raise CheckpointError(problem)
        self.path, self._saved_step = path, step

    def _is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept for good."""
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _prune(self, trainer: pl.Trainer) -> None:
        """Remove older checkpoints, and what a killed run left half-written."""
        folder = _folder(trainer)
        linked = _WRITTEN.fullmatch((Path(trainer.default_root_dir) / CHECKPOINT).resolve().name)
        steps = sorted(int(found[1]) for path in folder.iterdir() if (found := _WRITTEN.fullmatch(path.name)))
        # One that is newer than `last.ckpt` was written by a run that died before it moved the link.
        newest = [step for step in steps if linked is None or step <= int(linked[1])][-self.keep_last :]
        for step in steps:
            if step not in newest and not self._is_kept(step):
                trainer.strategy.remove_checkpoint(folder / _NAME.format(step))
        for left in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def checkpoint_bytes(module: pl.LightningModule, *, averaged: bool = False) -> int:
    """Size of a checkpoint: all weights, twice if `averaged`, and AdamW's two moments of those that train.

    Args:
        module: Its parameters may be sharded.
        averaged: Whether there is an average of the weights.
    """
    trained = _bytes(module, trained=True)
    return 2 * trained + (2 if averaged else 1) * (trained + _bytes(module, trained=False))


def _bytes(module: pl.LightningModule, *, trained: bool) -> int:
    """Size of the parameters that train, or of the others."""
    parameters = [p for p in module.parameters() if p.requires_grad == trained]
    return sum(p.numel() * p.element_size() for p in parameters)


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir).resolve() / CHECKPOINT.parent


def _point(trainer: pl.Trainer, path: Path) -> None:
    """Move the link `last.ckpt` to a checkpoint, atomically."""
    link = Path(trainer.default_root_dir) / CHECKPOINT
    with atomic_path(link) as new:
        new.symlink_to(path.name)


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be written: {error.strerror}; free some space, or set another run_dir"


def _no_room(folder: Path, needed: int) -> str | None:
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"{folder} has {free / 1e9:.2f} GB free, the checkpoints and the end of this stage take {needed / 1e9:.2f} GB: "
        "free some space, lower checkpoint_keep_last, or set another run_dir"
    )
