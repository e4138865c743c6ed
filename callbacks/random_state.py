"""Random numbers go on where the checkpoint left them, on every rank."""

import logging
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from alignvlm_pl.utils.collectives import gather

log = logging.getLogger(__name__)
KEY = "random_state"
State = dict[str, Any]


class RandomState(pl.Callback):
    """Keep the random number generators of all ranks in the checkpoint: Python's, NumPy's, torch's and CUDA's.

    They are set back at the first batch after a resume, behind everything that draws numbers while a run is set up.
    Another number of ranks starts from its seed instead, and says so.
    """

    def __init__(self) -> None:
        self._state: State | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather the states of all ranks; all of them save."""
        checkpoint[KEY] = gather(generator_states())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take this rank's state."""
        states = checkpoint.get(KEY)
        if states is None:
            return
        if len(states) == trainer.world_size:
            self._state = states[trainer.global_rank]
        elif trainer.is_global_zero:
            log.warning(
                "the checkpoint is of %d ranks, these are %d: random numbers (dropout) start from the seed again",
                len(states), trainer.world_size,
            )  # fmt: skip

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the generators back, once."""
        if self._state is not None:
            restore_generators(self._state)
            self._state = None


def generator_states() -> State:
    """States of this process's generators, in tensors and plain types: checkpoints are read with `weights_only`."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        # This rank's device alone: asking the others would start them up from here.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_generators(state: State) -> None:
    """Set this process's generators; CUDA's only where there is such a device now."""
    random.setstate(_tuples(state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tuples(value: Any) -> Any:
    """`random.setstate` takes tuples alone."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
