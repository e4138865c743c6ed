"""The states of the random number generators of all ranks in the checkpoint."""

import logging
import os
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
    """Save and restore the generators of Python, NumPy, torch and CUDA of each rank, at the first batch after a resume.

    On another number of ranks they start from the seed, with a warning.
    """

    def __init__(self) -> None:
        self._state: State | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = gather(generator_states())

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(KEY)
        if states is None:
            return
        seeds = states[0].get("seed"), os.environ.get("PL_GLOBAL_SEED")
        if None not in seeds and seeds[0] != seeds[1] and trainer.is_global_zero:
            log.warning("seed_everything=%s has no effect: the run resumes with the random numbers of %s", *seeds[::-1])
        if len(states) == trainer.world_size:
            self._state = states[trainer.global_rank]
        elif trainer.is_global_zero:
            log.warning(
                "the checkpoint has %d ranks, this run %d: random numbers (dropout) start from the seed again",
                len(states), trainer.world_size,
            )  # fmt: skip

    def on_train_batch_start(self, *_: Any) -> None:
        if self._state is not None:
            restore_generators(self._state)
            self._state = None


def generator_states() -> State:
    """Return the states of this process's generators, in types that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        # Of this rank's device alone: reading those of other devices would initialise them.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_generators(state: State) -> None:
    """Set this process's generators; CUDA's where there is a GPU."""
    random.setstate(_tuples(state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, as `random.setstate` needs them."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
