"""Settings that would do something else here than they say, refused before anything is loaded."""

import re
from typing import Any

from ..errors import ConfigError
from ..strategies.fsdp import unsupported


def check_trainer(trainer: Any) -> None:
    """Refuse strategies and a way of clipping that training does not follow.

    Raises:
        ConfigError: Naming the setting, its value and what to set.
    """
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy.startswith(("fsdp", "deepspeed")):
        raise unsupported(strategy)  # Lightning would ask for a GPU, or for a package, first
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ConfigError(
            f"trainer.gradient_clip_algorithm={trainer.gradient_clip_algorithm}: gradients are clipped by their norm; "
            "leave it out"
        )


def check_fit(config: Any) -> None:
    """Refuse what would end a stage early and have the next one start from it, and a size that is none.

    Raises:
        ConfigError: Naming the setting, its value and what to set.
    """
    if config.trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.fast_dev_run={config.trainer.fast_dev_run}: it would leave a finished stage; set "
            "stage.max_steps and another run_dir instead"
        )
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", config.max_shard_size):
        raise ConfigError(f"max_shard_size={config.max_shard_size}: expected a size such as 5GB")
