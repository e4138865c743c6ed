"""`stage.ema_decay`: a moving average of the weights, for validation, benchmarks and the export."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from alignvlm_pl.errors import ConfigError


class AveragedWeights(WeightAveraging):
    """Lightning's weight averaging, as an exponential moving average that leaves frozen weights bit-identical.

    After optimizer step t, average <- decay · average + (1 - decay) · weights, from the weights after step 1 on;
    buffers are those of the weights. It is computed as a linear interpolation, which changes nothing where both are
    equal; Lightning's `EMAWeightAveraging` multiplies and adds, so that frozen weights would drift.

    The copy is made when the model is built, loaded and frozen, on the device that trains. Lightning's own `setup`
    would build the model before `StageTransition` has said what the stage is, and keep the average on the CPU.

    Checkpoint callbacks, which Lightning runs behind all others, save the average of the step that they save.

    Args:
        decay: Share of the average that is kept at each optimizer step, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self._averaging = {"use_buffers": False, "multi_avg_fn": get_ema_multi_avg_fn(decay)}
        super().__init__(**self._averaging)
        self.decay = decay
        self._swapped = False  # the module holds the average, the copy the weights that train

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that keep parameters in pieces.

        Raises:
            ConfigError: The strategy is not one device or DDP.
        """
        require_whole_parameters(trainer, f"stage.ema_decay={self.decay}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the model."""
        self._copy(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Copy the model and load both states (CONTRACT: `module.on_load_checkpoint` has seen that there are two)."""
        self._copy(trainer, pl_module)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as `state_dict` and the weights as `current_model_state`, whichever the module holds."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module with the average; the copy keeps the weights for a last checkpoint."""
        if not self._swapped:
            self._swap_models(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the copy: a recipe's next stage makes its own."""
        self._average_model = None

    def _copy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is None:
            self._average_model = AveragedModel(pl_module, device=trainer.strategy.root_device, **self._averaging)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped


def require_whole_parameters(trainer: pl.Trainer, setting: str) -> None:
    """Refuse a setting under strategies that shard parameters.

    Raises:
        ConfigError: The strategy is not one device or DDP.
    """
    strategy = trainer.strategy
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"{setting} needs all parameters on each rank, trainer.strategy is {type(strategy).__name__}; use "
            f"trainer.strategy: ddp, or leave {setting.split('=')[0]} out"
        )
