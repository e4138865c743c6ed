"""Losses that are not finite although the weights are: of a validation, and after the last step of a stage."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from alignvlm_pl.errors import TrainingError
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.collectives import gather

from .connector_health import evaluating
from .step import is_trial

_CURE = "the training that made these weights has diverged; lower the learning rates, or use an earlier checkpoint"


class FiniteLosses(pl.Callback):
    """End a run whose newest update has made the loss nan or inf, though the weights are finite.

    Within a stage the next step notices it; the last one is looked at here, before it is saved, by its last micro
    batch.
    """

    def __init__(self) -> None:
        self._step = 0
        self._sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compute the loss after the last step of the stage; a TrainingError on all ranks if it is not finite."""
        assert isinstance(pl_module, AlignVLMModule)
        done, self._step = trainer.global_step > self._step, trainer.global_step
        if not done or is_trial(trainer) or not (trainer.should_stop or trainer.global_step == trainer.max_steps):
            return
        with evaluating(trainer, pl_module):
            loss = pl_module.batch_loss(batch)[0].total
        if any(gather(not bool(loss.isfinite()))):
            pl_module.require_finite_step()  # a loss, gradient or weight of the step itself says more
        self._require({"train/loss": loss}, trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sums = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if isinstance(outputs, dict) and "loss_sum" in outputs:
            tag = f"val/{batch.get('dataset', dataloader_idx)}/loss"
            self._sums[tag] = self._sums.get(tag, 0) + outputs["loss_sum"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the loss of each dataset; a TrainingError on all ranks if one is not finite."""
        self._require(self._sums, trainer)

    on_test_start, on_test_batch_end, on_test_epoch_end = (
        on_validation_start,
        on_validation_batch_end,
        on_validation_epoch_end,
    )

    def _require(self, sums: dict[str, Tensor], trainer: pl.Trainer) -> None:
        invalid = next((tag for tag, value in sums.items() if not torch.isfinite(value).all()), None)
        if tag := next(filter(None, gather(invalid)), None):
            raise TrainingError(f"{tag} is not finite after step {trainer.global_step}: {_CURE}")
