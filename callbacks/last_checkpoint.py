"""`checkpoints/`: the states from which an interrupted stage goes on, and on which `test` can be run.

`step00000500.ckpt` is the state after 500 optimizer steps, `last.ckpt` a link to the newest. A state is written whole
before the link moves to it, and only then are older ones removed: whenever a run dies, and wherever the disk is full,
`last.ckpt` is a whole checkpoint. The same holds for a state that is a folder of shards.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.strategies.sharded_checkpoint import read_whole, replace_path, write_file

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Path below the run folder."""

_NAME = "step{:08d}.ckpt"
_WRITTEN = re.compile(r"step(\d{8})\.ckpt")


class LastCheckpoint(pl.Callback):
    """Keep the newest training states, written every n steps and when training ends.

    CONTRACT: alignvlm_pl/cli/lightning_cli.py puts this before `StageTransition`, whose folder marks the stage as
    finished and must therefore be written last.

    Args:
        every_n_steps: Interval in optimizer steps.
        keep_last: How many of the newest states are kept.
        keep_every_n_steps: Keep the states of these steps as well, for good; None: none.

    Raises:
        ConfigError: An interval is not positive, or no state falls on `keep_every_n_steps`.
    """

    def __init__(
        self, every_n_steps: int, *, keep_last: int = 1, keep_every_n_steps: int | None = None
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
        self._saved_step = -1

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Never write again over the state that the run goes on from."""
        self._saved_step = int(checkpoint["global_step"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear away what a killed run left half-written, and see whether there is room.

        Raises:
            CheckpointError: There is not; naming the space there is and the space it takes. On all ranks.
        """
        refused = None
        if trainer.is_global_zero:
            refused = self._prepare(trainer, pl_module)
        if (refused := trainer.strategy.broadcast(refused)) is not None:
            raise CheckpointError(refused)

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        folder = _folder(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._prune(trainer)
            if trainer.fit_loop.done:  # nothing is saved any more
                return None
            return _no_room(folder, self._bytes_to_come(folder, pl_module))
        except OSError as error:
            return _unwritable(folder, error)

    def _bytes_to_come(self, folder: Path, module: pl.LightningModule) -> int:
        """What the newest states, one written beside them and the stage-end weights take on top of what is there."""
        averaged = bool(getattr(getattr(module, "stage", None), "ema_decay", None))
        steps = [int(found[1]) for path in folder.iterdir() if (found := _WRITTEN.fullmatch(path.name))]
        there = sum(1 for step in steps if not self._is_kept(step))
        states = max(self.keep_last + 1 - there, 1)
        state = checkpoint_bytes(module, averaged=averaged)
        return states * state + _bytes(module, trained=True) + _bytes(module, trained=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n optimizer steps."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the stage, or where it was interrupted."""
        if not trainer.interrupted:
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
        self._saved_step = step

    def _is_kept(self, step: int) -> bool:
        """Whether the state of a step is kept for good."""
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def _prune(self, trainer: pl.Trainer) -> None:
        """Remove older states, and what a killed run left half-written."""
        folder = _folder(trainer)
        linked = _WRITTEN.fullmatch((Path(trainer.default_root_dir) / CHECKPOINT).resolve().name)
        steps = sorted(int(found[1]) for path in folder.iterdir() if (found := _WRITTEN.fullmatch(path.name)))
        # One that is newer than `last.ckpt` was written by a run that died before it moved the link.
        newest = [step for step in steps if linked is None or step <= int(linked[1])][-self.keep_last :]
        for step in steps:
            if step not in newest and not self._is_kept(step):
                trainer.strategy.remove_checkpoint(folder / _NAME.format(step))
        for left in folder.glob("*.partial"):
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
    """Move the link `last.ckpt` to a state, at once."""
    link = Path(trainer.default_root_dir) / CHECKPOINT
    new = link.with_name(link.name + ".partial")
    new.unlink(missing_ok=True)
    new.symlink_to(path.name)
    os.replace(new, link)


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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a full disk or a kill leaves the earlier one as it was.

    Lightning writes to the system's temporary folder instead, from where a move to another disk is a copy. Sharded
    strategies write folders (alignvlm_pl/strategies/folder_checkpoints.py), which are read here for those that are not.
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
            return read_whole(Path(path))
        found: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return found
