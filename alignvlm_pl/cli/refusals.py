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
    "gradient_clip_val",
    "limit_train_batches",
    "val_check_interval",
)
_LEAST = {"log_every_n_steps": 0, "num_sanity_val_steps": -1}
_NOT_0 = ("max_epochs", "max_steps")


def check_trainer(trainer: Any, *, fit: bool) -> None:
    """Refuse callbacks of Lightning's that change what the stage decides, strategies that training does not follow, and
    intervals and limits with which Lightning divides by zero, trains nothing or uphill, by a ConfigError.
    """
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        module, _, name = str(getattr(callback, "class_path", "")).rpartition(".")
        if module.startswith("lightning.pytorch.") and name in CALLBACKS:
            raise ConfigError(f"trainer.callbacks: {name} does not go with a stage; {CALLBACKS[name]}")
    numbers = {name: trainer[name] for name in (*_ABOVE_0, *_NOT_0, *_LEAST) if isinstance(trainer[name], (int, float))}
    for name, value in numbers.items():
        if (name in _NOT_0 and value == 0) or (name in _ABOVE_0 and not value > 0):
            raise ConfigError(f"trainer.{name}={value}: expected a number above 0")
        if value < _LEAST.get(name, value):
            raise ConfigError(f"trainer.{name}={value}: expected at least {_LEAST[name]}")
    if trainer.barebones:
        raise ConfigError(
            "trainer.barebones=true turns checkpoints, logs and progress off, which a stage needs; remove it, and see "
            "perf/train_step.py for the bare speed of a step"
        )
    if fit and trainer.enable_checkpointing is False:
        raise ConfigError(
            "trainer.enable_checkpointing=false: a stage is exported from its last checkpoint; remove the setting, "
            "which configs of earlier versions hold as a default"
        )
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith(("fsdp", "deepspeed")):
        raise unsupported(trainer.strategy)  # Lightning would ask for a GPU, or for a package, first
