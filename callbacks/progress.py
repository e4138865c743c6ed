"""Progress of training: a rich bar with stage, loss, tokens/s and ETA, or plain lines where there is no terminal."""

import logging
import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from alignvlm_pl.module import AlignVLMModule

log = logging.getLogger(__name__)


class TrainingProgress(RichProgressBar):
    """Show and log how training goes.

    Args:
        every_n_steps: Interval of the plain lines and of the logged rates, in optimizer steps.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        super().__init__(leave=True)
        self.every_n_steps = every_n_steps
        self._tokens = 0
        self._since = 0.0
        self._tokens_per_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start measuring."""
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, AlignVLMModule)
        self._tokens, self._since = pl_module.tokens_seen, time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and report every n steps."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, AlignVLMModule)
        step = trainer.global_step
        if not step or step % self.every_n_steps or trainer.fit_loop._should_accumulate():
            return
        now = time.monotonic()
        per_rank = (pl_module.tokens_seen - self._tokens) / max(now - self._since, 1e-9)
        self._tokens_per_s = per_rank * trainer.world_size
        self._tokens, self._since = pl_module.tokens_seen, now
        values = {f"lr/{g['name']}": g["lr"] for g in trainer.optimizers[0].param_groups}
        values["perf/tokens_per_s"] = self._tokens_per_s
        if trainer.logger is not None:
            trainer.logger.log_metrics(values, step=step)
        if trainer.is_global_zero and not sys.stderr.isatty():
            log.info("%s", self._line(trainer, pl_module))

    @property
    def total_train_batches(self) -> int | float:
        """Micro batches of this epoch: an epoch's, or those that the stage's steps leave."""
        left = (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches
        every: int | float = self.trainer.num_training_batches
        return min(every, left) if self.trainer.max_steps > 0 else every

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Fields right of the bar; its own columns show steps and the time that remains."""
        assert isinstance(pl_module, AlignVLMModule)
        if pl_module.stage is None:
            return {}
        fields = {"stage": pl_module.stage.name, "loss": f"{pl_module.last_loss:.3f}"}
        eta = self._eta(trainer, pl_module) if trainer.global_step else "-"
        return {**fields, "tokens/s": f"{self._tokens_per_s:.0f}", "ETA": str(eta)}

    def _eta(self, trainer: pl.Trainer, pl_module: AlignVLMModule) -> timedelta:
        """Time the stage has left: by its steps at the pace so far, or by its clock."""
        assert pl_module.stage is not None
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        remaining = pl_module.stage_seconds / step * (total - step)
        if pl_module.stage.max_minutes is not None:
            remaining = min(remaining, 60 * pl_module.stage.max_minutes - pl_module.stage_seconds)
        return timedelta(seconds=max(round(remaining), 0))

    def _line(self, trainer: pl.Trainer, pl_module: AlignVLMModule) -> str:
        assert pl_module.stage is not None
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        return (
            f"stage {pl_module.stage.name} step {step}/{total} loss {pl_module.last_loss:.4f} "
            f"{self._tokens_per_s:.0f} tokens/s ETA {self._eta(trainer, pl_module)}"
        )
