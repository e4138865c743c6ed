"""`checkpoints/`: `step00000500.ckpt` after 500 optimizer steps, and the link `last.ckpt` to the newest.

A checkpoint is complete before the link moves to it, and only then are older ones removed: whenever a run dies or the
disk is full, `last.ckpt` is a complete checkpoint.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from alignvlm_pl.errors import CheckpointError, ConfigError, require_at_least
from alignvlm_pl.utils import stop_signals
from alignvlm_pl.utils.atomic_files import PARTIAL, atomic_path, remove

from .preemption import Preemption
from .step import on_one_rank

CHECKPOINT = Path("checkpoints") / "last.ckpt"  # Path below the run folder

_NAME = "step{:08d}.ckpt"
_WRITTEN = re.compile(r"step(\d{8})\.ckpt")


class LastCheckpoint(Checkpoint):
    """Keep the newest checkpoints of a run, written by steps or time, where it is preempted, and after the last step.

    It is a Lightning `Checkpoint`, which runs behind all other callbacks. A `ModelCheckpoint` works beside it, but
    replaces its link `last.ckpt` in two steps and cannot save where a run is preempted.

    Args:
        preemption: Whether the run is about to end, and whether rank 0's time for a checkpoint has come.
        every_n_steps: Interval in optimizer steps; None: none.
        keep_last: Number of the newest checkpoints that are kept.
        keep_every_n_steps: Also keep the checkpoints of these steps, a multiple of `every_n_steps`; None: none.
        every_minutes: Longest time between two checkpoints by the clock of rank 0, looked at where `preemption` looks
            for a signal; None: any.
    """

    def __init__(
        self,
        preemption: Preemption,
        every_n_steps: int | None,
        *,
        keep_last: int = 1,
        keep_every_n_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        require_at_least(1, "checkpoint_", every_n_steps=every_n_steps, keep_last=keep_last)
        if every_minutes is not None and not every_minutes > 0:
            raise ConfigError(f"checkpoint_every_minutes={every_minutes}: expected more than 0, or null")
        if keep_every_n_steps is not None and (
            keep_every_n_steps < 1 or every_n_steps is None or keep_every_n_steps % every_n_steps
        ):
            raise ConfigError(
                f"checkpoint_keep_every_n_steps={keep_every_n_steps}: expected a multiple of "
                f"checkpoint_every_n_steps={'null' if every_n_steps is None else every_n_steps}, or null"
            )
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.path: Path | None = None  # the newest, or the one that the run resumed from
        self._preemption = preemption
        self._preemption.is_time_to_save = self._is_time
        self._saved_step = 0  # a run without a step has nothing to save
        self._saved_at = time.monotonic()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Do not write the checkpoint that the run resumes from again."""
        self._saved_step = int(checkpoint["global_step"])
        self.path = Path(str(trainer.ckpt_path))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove incomplete files of a killed run; raise a CheckpointError if the disk has too little space."""
        self._saved_at = time.monotonic()
        on_one_rank(trainer, lambda: self._prepare(trainer, pl_module))

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = _folder(trainer)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._prune(trainer)
            needed, free = self._bytes_needed(folder, pl_module), shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"{folder} has {free / 1e9:.2f} GB free, the checkpoints and the end of this stage take "
                f"{needed / 1e9:.2f} GB: free some space, lower checkpoint_keep_last, or set another run_dir"
            )

    def _bytes_needed(self, folder: Path, module: pl.LightningModule) -> int:
        """Bytes of the newest checkpoints, one written beside them and the export, without those on the disk."""
        averaged = bool(getattr(getattr(module, "stage", None), "ema_decay", None))
        there = sum(not self._is_kept(step) for step in _steps(folder))
        size = checkpoint_bytes(module, averaged=averaged)
        return max(self.keep_last + 1 - there, 1) * size + sum(_bytes(module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every_n_steps is not None and step % self.every_n_steps == 0)
        if due or self._preemption.save_due or self._preemption.leaving:
            self.save(trainer)

    def _is_time(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._saved_at > 60 * self.every_minutes

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        if self._preemption.leaving and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the checkpoint of this step, once; all ranks must call it, between two steps, and get the same error."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = _folder(trainer) / _NAME.format(step)
        trainer.save_checkpoint(path)
        on_one_rank(trainer, lambda: self._link(trainer, path))
        self.path, self._saved_step, self._saved_at = path, step, time.monotonic()
        stop_signals.progress = step, step

    def _link(self, trainer: pl.Trainer, path: Path) -> None:
        with _writing(path.parent):
            with atomic_path(Path(trainer.default_root_dir) / CHECKPOINT) as new:
                new.symlink_to(path.name)
            self._prune(trainer)

    def _is_kept(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _prune(self, trainer: pl.Trainer) -> None:
        folder = _folder(trainer)
        linked = _WRITTEN.fullmatch((Path(trainer.default_root_dir) / CHECKPOINT).resolve().name)
        steps = _steps(folder)
        # One that is newer than `last.ckpt` was written by a run that died before it moved the link.
        newest = [step for step in steps if linked is None or step <= int(linked[1])][-self.keep_last :]
        for step in steps:
            if step not in newest and not self._is_kept(step):
                trainer.strategy.remove_checkpoint(folder / _NAME.format(step))
        for partial in folder.glob(f"*{PARTIAL}"):
            remove(partial)


def checkpoint_bytes(module: pl.LightningModule, *, averaged: bool = False) -> int:
    """Bytes of a checkpoint: all weights, twice if there is an average of them, and AdamW's two moments."""
    trained, frozen = _bytes(module)
    return 2 * trained + (2 if averaged else 1) * (trained + frozen)


def _bytes(module: pl.LightningModule) -> tuple[int, int]:
    """Bytes of the parameters that train, and of the others; they may be sharded."""
    sizes = [(p.requires_grad, p.numel() * p.element_size()) for p in module.parameters()]
    return sum(size for trains, size in sizes if trains), sum(size for trains, size in sizes if not trains)


def _steps(folder: Path) -> list[int]:
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _WRITTEN.fullmatch(path.name)))


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir).resolve() / CHECKPOINT.parent


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}; free some space, or set another run_dir"
        raise CheckpointError(text) from error
