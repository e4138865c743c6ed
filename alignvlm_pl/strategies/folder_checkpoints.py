"""Strategies whose training state is a folder of shards (`alignvlm_pl.strategies.sharded_checkpoint`)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ParallelStrategy

from ..errors import CheckpointError
from ..utils.atomic_files import partial_path, replace_path
from ..utils.collectives import gather
from .sharded_checkpoint import load_file, rank_state, read_folder, write_rank


class FolderCheckpoints(ParallelStrategy):
    """A strategy that writes a folder, and reads one or another strategy's file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write a folder beside its place and rename it; all ranks must call.

        Raises:
            CheckpointError: A rank could not write; on all ranks. An earlier checkpoint is as it was.
        """
        path = Path(self.broadcast(str(filepath)))
        partial = partial_path(path)
        rank, ranks = self.global_rank, self.world_size
        own = rank_state(checkpoint, rank=rank)
        problem = None
        if self.is_global_zero:
            problem = _catch_error(lambda: _make_empty(partial))
        self._raise_on_all_ranks(problem, path, partial)
        self._raise_on_all_ranks(
            _catch_error(lambda: write_rank(partial, own, checkpoint, rank=rank, ranks=ranks)), path, partial
        )
        if self.is_global_zero:
            problem = _catch_error(lambda: replace_path(partial, path))
        self._raise_on_all_ranks(problem, path, partial)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder, or another strategy's file; this rank's values are taken when they are set."""
        path = Path(checkpoint_path)
        if path.is_dir():
            return read_folder(path)
        return load_file(path)

    def _raise_on_all_ranks(self, problem: str | None, path: Path, partial: Path) -> None:
        """Raise on all ranks if one has a problem."""
        if found := next(filter(None, gather(problem)), None):
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"could not write checkpoint {path}: {found}; the earlier one is as it was; free some space or set "
                "another run_dir"
            )


def evaluate_without_inference_mode(trainer: pl.Trainer) -> None:
    """Have evaluation run without `torch.inference_mode`, whose gathered tensors training cannot use again."""
    for loop in (
        trainer.fit_loop.epoch_loop.val_loop,
        trainer.validate_loop,
        trainer.test_loop,
        trainer.predict_loop,
    ):
        loop.inference_mode = False


def _catch_error(action: Callable[[], None]) -> str | None:
    """Run `action`; return the text of its error, None without one."""
    try:
        action()
    except OSError as error:
        return str(error)
    except Exception as error:  # raised on all ranks, which would wait for this one otherwise
        return f"{type(error).__name__}: {error}"
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
