"""A callback that sends its own process a signal at a chosen place, once a run folder."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Signaller(pl.Callback):
    """Send `signals` from `rank` at a place of the stage `stage`, when `step` optimizer steps are done.

    Places: `step` (within the next step), `validation` (after its first batch), `saving` (within the save),
    `train_end`, `fit_end`, and `setup`, where the model is not built yet. With `group` all ranks and loader workers get
    them too.
    """

    def __init__(
        self,
        place: str,
        stage: str,
        step: int = 0,
        rank: int = 0,
        signals: list[str] | None = None,
        group: bool = False,
    ) -> None:
        self.group = group
        self.place, self.stage, self.step, self.rank = place, stage, step, rank
        self.signals = signals or ["SIGUSR1"]

    @property
    def state_key(self) -> str:
        return f"Signaller-{self.place}-{self.step}"

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        self._send("step", trainer, pl_module)  # not where a batch starts: a run that is asked to stop leaves there

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *rest: Any) -> None:
        self._send("validation", trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._send("saving", trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._send("train_end", trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._send("fit_end", trainer, pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._send("setup", trainer, pl_module)

    def _send(self, place: str, trainer: pl.Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir)
        sent = folder / f"sent-{self.state_key}"
        here = place == self.place and trainer.global_rank == self.rank and folder.name == self.stage
        if here and trainer.global_step == self.step and not sent.exists():
            sent.touch()
            for name in self.signals:
                if self.group:  # by another process: workers end at their main process's SIGTERM
                    words = ["kill", f"-{name.removeprefix('SIG')}", "--", f"-{os.getpgrp()}"]
                    subprocess.run(words, check=True, start_new_session=True)
                else:
                    os.kill(os.getpid(), getattr(signal, name))


class Pace(pl.Callback):
    """Let each micro batch take a time, so that a signal from outside finds the stage it was meant for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)
