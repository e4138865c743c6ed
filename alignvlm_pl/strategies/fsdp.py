"""FSDP2 as a Lightning strategy: the model is built and loaded in shards, and saved as a folder of them."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from ..errors import ConfigError
from .folder_checkpoints import FolderCheckpoints, evaluate_without_inference_mode
from .sharded_checkpoint import take_rows
from .sharding import shard


class ShardedStrategy(FolderCheckpoints, ModelParallelStrategy):
    """Parameters, gradients and optimizer state are sharded over all ranks (FSDP2); works on CPUs too.

    With `precision: bf16-mixed` each rank keeps its rows in float32; they are gathered in bfloat16, and gradients are
    summed in float32.

    Args:
        reshard_vision: Whether the vision tower's layers are freed after forward and gathered again in backward, which
            takes less memory and more traffic.
        reshard_llm: Likewise of the LLM's layers.
        timeout_minutes: How long a rank waits for the others before it gives up.
    """

    def __init__(
        self, reshard_vision: bool = True, reshard_llm: bool = True, timeout_minutes: float = 30.0
    ) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))
        self.reshard_vision = reshard_vision
        self.reshard_llm = reshard_llm

    # The model is built, sharded and on its device when `configure_model` returns, so a checkpoint is restored at the
    # same moment as under other strategies: callbacks find the same state in their hooks.
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True."""
        return True

    def setup_environment(self) -> None:
        """All ranks are data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """As Lightning; evaluation without `torch.inference_mode`."""
        evaluate_without_inference_mode(trainer)
        super().setup(trainer)

    def shard(self, model: nn.Module, load: Callable[[], None]) -> None:
        """Shard a model that was built on the meta device, and load it.

        Args:
            model: An `AlignVLMForConditionalGeneration` whose freeze table has been applied.
            load: Loads each rank's rows.

        Raises:
            ConfigError: The precision needs a loss scale, which is not kept in step over ranks here.
        """
        precision = str(self.precision_plugin.precision)
        if precision.startswith("16"):
            raise ConfigError(
                f"trainer.precision={precision} does not go with a sharded model; use bf16-mixed"
            )
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(
            model,
            self.device_mesh["data_parallel"],
            policy=policy,
            reshard_vision=self.reshard_vision,
            reshard_llm=self.reshard_llm,
        )
        load()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, sharded."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, sharded."""
        wrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = wrapped.state_dict()
        return state

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's rows of the checkpoint into the model."""
        assert self.lightning_module is not None
        state, stored = self.lightning_module.state_dict(), checkpoint["state_dict"]
        for name, tensor in state.items():
            tensor.copy_(take_rows(stored[name], tensor))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers this rank's rows of their state."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {
                    key: take_rows(value, parameters[index])
                    if value.shape == parameters[index].shape
                    else value
                    for key, value in values.items()
                }
                for index, values in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})


def refuse_unknown(strategy: Strategy) -> None:
    """Refuse strategies whose gradients, checkpoints or exports would be invalid.

    Raises:
        ConfigError: The strategy shards in a way of its own.
    """
    known = isinstance(strategy, ShardedStrategy)
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)) and not known:
        raise unsupported(type(strategy).__name__)


def unsupported(strategy: str) -> ConfigError:
    """The refusal of a strategy, by its name."""
    return ConfigError(
        f"trainer.strategy {strategy} is not supported; configs/cluster/fsdp.yaml shards the model with "
        "alignvlm_pl.strategies.fsdp.ShardedStrategy"
    )
