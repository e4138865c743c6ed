"""Progress of training: a rich bar with stage, loss, throughput and ETA, or plain lines without a terminal."""

import logging
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from alignvlm_pl.errors import require_at_least
from alignvlm_pl.training.module import AlignVLMModule

from .step import ends_step

log = logging.getLogger(__name__)
_REFRESH_S = 2.0  # Shortest time between two reads of the loss, which wait for the device
_SHOWN = {  # tag -> name in the bar, format
    "perf/tokens_per_s": ("tokens/s", "{:.0f}"),
    "perf/tiles_per_s": ("tiles/s", "{:.1f}"),
    "perf/mfu": ("MFU", "{:.1%}"),
    "data/wait_share": ("wait", "{:.0%}"),
    "data/padding_share": ("padding", "{:.0%}"),
    "perf/memory_gib": ("GiB", "{:.1f}"),
}
_SHOWN_OF_EACH = {  # beginning of the tags of sources or parts -> what stands before their names, format
    "train/loss/": ("loss", "{:.3f}"),
    "train/gradient_norm/": ("norm", "{:.3g}"),
    "lr/": ("lr", "{:.2g}"),
}


class TrainingProgress(RichProgressBar):
    """Show the progress of training.

    Args:
        every_n_steps: Interval in optimizer steps of the plain lines, at least 1. The bar shows the metrics logged last
            (`trainer.log_every_n_steps`).
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        require_at_least(1, "progress.", every_n_steps=every_n_steps)
        super().__init__(leave=True)
        self.every_n_steps = every_n_steps
        self._loss: Any = math.nan  # of the last micro batch, on the device
        self._fields: dict[str, str] = {}
        self._fields_since = -math.inf

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, AlignVLMModule)
        self._loss = outputs["loss_sum"] / outputs["document_supervised"].sum().clamp(min=1)
        step = trainer.global_step
        if not step or step % self.every_n_steps or not ends_step(trainer, batch_idx):
            return
        if trainer.is_global_zero and not sys.stderr.isatty():
            log.info("%s", self._line(trainer, pl_module))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fields_since = -math.inf
        super().on_train_epoch_end(trainer, pl_module)

    @property
    def total_train_batches(self) -> int | float:
        """Micro batches of this epoch, at most those of the stage's remaining steps."""
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        every: int | float = self.trainer.num_training_batches
        return min(every, left) if self.trainer.max_steps > 0 else every

    def _get_train_description(self, current_epoch: int) -> str:  # no public hook; Lightning's says "Epoch 0/-2"
        return f"Epoch {current_epoch}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, AlignVLMModule)
        now = time.monotonic()
        if pl_module.stage is not None and now > self._fields_since + _REFRESH_S:
            eta = self._eta(trainer, pl_module) if trainer.global_step else "-"
            self._fields = {
                "stage": pl_module.stage.name,
                "loss": f"{float(self._loss):.3f}",
                **shown(latest(trainer)),
                "ETA": str(eta),
            }
            self._fields_since = now
        return dict(self._fields)

    def _eta(self, trainer: pl.Trainer, pl_module: AlignVLMModule) -> timedelta:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        remaining = pl_module.stage_seconds / step * (total - step)
        if (limit := pl_module.current_stage.max_minutes) is not None:
            remaining = min(remaining, 60 * limit - pl_module.stage_seconds)
        return timedelta(seconds=max(round(remaining), 0))

    def _line(self, trainer: pl.Trainer, pl_module: AlignVLMModule) -> str:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        return (
            f"stage {pl_module.current_stage.name} step {step}/{total} loss {float(self._loss):.4f} "
            f"{shown(latest(trainer)).get('tokens/s', '-')} tokens/s ETA {self._eta(trainer, pl_module)}"
        )


def latest(trainer: pl.Trainer) -> dict[str, Any]:
    """Tag -> value of the metrics that the module and the callbacks have logged last."""
    logged: dict[str, Any] = {**trainer.logged_metrics}
    for callback in cast(Any, trainer).callbacks:
        logged |= getattr(callback, "latest", {})
    return logged


def shown(values: Mapping[str, Any]) -> dict[str, str]:
    """Fields of the bar for the metrics that are there; reading them may wait for the device."""
    fields = {name: form.format(values[tag]) for tag, (name, form) in _SHOWN.items() if tag in values}
    for start, (name, form) in _SHOWN_OF_EACH.items():
        of_each = {tag.removeprefix(start): value for tag, value in values.items() if tag.startswith(start)}
        fields |= {f"{name} {of}": form.format(float(value)) for of, value in of_each.items()}
    return fields
