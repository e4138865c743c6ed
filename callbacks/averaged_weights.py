"""`stage.ema_decay`: a moving average of the weights, for validation, benchmarks and the export."""

from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alignvlm_pl.errors import CheckpointError, ConfigError
from alignvlm_pl.training.finite import require_finite


class AveragedWeights(pl.Callback):
    """Exponential moving average of the weights, by torch's `AveragedModel`; frozen weights stay bit-identical.

    After optimizer step t, average <- decay · average + (1 - decay) · weights, from the weights after step 1 on, as a
    linear interpolation, which changes nothing where both are equal; buffers are those of the weights.

    Lightning's `WeightAveraging` makes its copy in `setup`, before `StageTransition` has begun the stage, on the CPU.
    Its checkpoint keys are kept: `state_dict` is the average, `current_model_state` the weights, `averaging_state` the
    number of updates. `decay` is in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: AveragedModel | None = None
        self._swapped = False  # the module holds the average, the average model the weights that train
        self._step = 0  # at which the average was updated

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_whole_parameters(trainer, f"stage.ema_decay={self.decay}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Update the average after each optimizer step; checkpoint callbacks run later and save it."""
        if self._average is not None and trainer.global_step > self._step:
            self._average.update_parameters(pl_module)
            self._step = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._swap(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module with the average; the copy keeps the weights for a last checkpoint."""
        if not self._swapped:
            self._swap(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the copy: a recipe's next stage makes its own."""
        self._average = None

    def state_dict(self) -> dict[str, Any]:
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._average is None:
            return
        require_finite(self._average.module.named_parameters(), source=f"step {trainer.global_step} is not saved")
        other = self._average.module.state_dict()
        weights, average = (other, checkpoint["state_dict"]) if self._swapped else (checkpoint["state_dict"], other)
        counters = {"n_averaged": self._average.n_averaged}
        checkpoint |= {"state_dict": average, "current_model_state": weights, "averaging_state": counters}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the average; raises a CheckpointError where the checkpoint holds none."""
        if "averaging_state" not in checkpoint:
            raise CheckpointError(
                f"stage.ema_decay={self.decay}: the checkpoint holds no average of the weights; resume without "
                "ema_decay, or begin a new run from these weights"
            )
        average = self._begin(trainer, pl_module)
        average.module.load_state_dict(checkpoint["state_dict"])
        average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        pl_module.load_state_dict(checkpoint["current_model_state"])

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> AveragedModel:
        if self._average is None:
            average = get_ema_multi_avg_fn(self.decay)
            self._average = AveragedModel(module, device=trainer.strategy.root_device, multi_avg_fn=average)
        return self._average

    def _swap(self, module: pl.LightningModule) -> None:
        if self._average is None:
            return
        averaged = chain(self._average.module.parameters(), self._average.module.buffers())
        for one, other in zip(averaged, chain(module.parameters(), module.buffers()), strict=True):
            value = one.data.clone()
            one.data.copy_(other.data)
            other.data.copy_(value)
        self._swapped = not self._swapped


def require_whole_parameters(trainer: pl.Trainer, setting: str) -> None:
    """Raise a ConfigError for a setting under a strategy that is neither one device nor DDP."""
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{setting} needs all parameters on each rank, trainer.strategy is {type(strategy).__name__}; use "
            f"trainer.strategy: ddp, or leave {setting.split('=')[0]} out"
        )
