"""Settings that would do something else here than they say, refused before anything is loaded."""

from typing import Any

from ..errors import ConfigError
from ..strategies.fsdp import unsupported

CALLBACKS = {
    "GradientAccumulationScheduler": "accumulation follows from stage.global_batch_size",
    "LearningRateFinder": "each part has a learning rate of its own: set stage.lr_vision, lr_connector, lr_llm",
    "BatchSizeFinder": "set data.init_args.batch_size; stage.global_batch_size stays as it is",
    "StochasticWeightAveraging": "set stage.ema_decay, such as 0.999, for averaged weights",
}
"""Lightning's callbacks that do not go with a stage -> what to use instead."""

_ABOVE_0 = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "val_check_interval",
)


def check_trainer(trainer: Any) -> None:
    """Refuse callbacks of Lightning's that change what the stage decides, strategies that training does not follow, and
    intervals and limits of 0, with which Lightning divides by zero or trains nothing.

    Raises:
        ConfigError: Naming the setting, its value and what to use instead.
    """
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        module, _, name = str(getattr(callback, "class_path", "")).rpartition(".")
        if module.startswith("lightning.pytorch.") and name in CALLBACKS:
            raise ConfigError(f"trainer.callbacks: {name} does not go with a stage; {CALLBACKS[name]}")
    for name in _ABOVE_0:
        value = trainer[name]
        if isinstance(value, (int, float)) and (value == 0 or (name.startswith("accumulate") and value < 0)):
            raise ConfigError(f"trainer.{name}={value}: expected a number above 0")
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith(("fsdp", "deepspeed")):
        raise unsupported(trainer.strategy)  # Lightning would ask for a GPU, or for a package, first
