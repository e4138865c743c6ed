"""A callback that kills its run with -9 at a named point of a named stage."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

KILL_AT = "KILL_AT"
"""Environment variable: `<stage>:<point>`; nothing is killed without it."""

POINTS = {
    "setup": "the stage begins, nothing is loaded",
    "begun": "everything is loaded, nothing is trained",
    "trained": "step 2 is trained, its checkpoint not begun",
    "written": "the checkpoint of step 2 is written, but not under its name",
    "unlinked": "it has its name, `last.ckpt` is still the one before",
    "ended": "the last step's checkpoint is there, the export not begun",
    "exporting": "the folder of weights is written, but not under its name",
    "exported": "it has its name, the run has not ended",
}
_STEP = 2
_BEFORE_RENAME = {"written": f"step{_STEP:08d}.ckpt", "exporting": "hf"}


class Killer(pl.Callback):
    """Kill this process and all ranks beside it, without a chance to clean up.

    It comes before the callbacks that save, because callbacks of the configuration do.
    """

    def __init__(self) -> None:
        self._stage, _, self._point = os.environ.get(KILL_AT, "").partition(":")
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the stage by its folder's name, `<number>-<stage>`."""
        if Path(trainer.default_root_dir).name.partition("-")[2] != self._stage:
            self._point = ""
        assert not self._point or self._point in POINTS, self._point
        self._trainer = trainer
        self._watch_renames()
        self._die("setup")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the first batch."""
        self._die("begun")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step."""
        if trainer.global_step == _STEP:
            self._die("trained")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step."""
        self._die("ended")

    def _watch_renames(self) -> None:
        rename = os.replace

        def watched(source: Any, target: Any) -> None:
            if Path(target).name == _BEFORE_RENAME.get(self._point):
                self._die(self._point)
            if Path(target).name == "last.ckpt" and self._trainer is not None and self._trainer.global_step == _STEP:
                self._die("unlinked")
            rename(source, target)
            if Path(target).name == "hf":
                self._die("exported")

        os.replace = watched  # type: ignore[assignment]

    def _die(self, point: str) -> None:
        if self._point == point:
            os.killpg(os.getpgrp(), signal.SIGKILL)
