"""FSDP2 as a Lightning strategy: the model is built and loaded in shards, and saved as a folder of them."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigError
from ..utils.atomic_files import partial_path, replace_path
from ..utils.collectives import gather
from .sharded_checkpoint import load_file, rank_state, read_folder, take_rows, write_rank
from .sharding import gradients_kept, shard


class ShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state are sharded over all ranks (FSDP2); works on CPUs too.

    With `precision: bf16-mixed` each rank keeps its rows in float32; they are gathered in bfloat16, and gradients are
    summed in float32.

    Args:
        reshard_vision: Whether the vision tower's layers are freed after forward and gathered again in backward, which
            takes less memory and more traffic.
        reshard_llm: Likewise of the LLM's layers.
        shard_within_node: Whether each node has a whole copy of the state, sharded over its GPUs (HSDP). Parameters are
            then gathered within the node, and gradients are reduced over the nodes once an optimizer step.
        sync_every_micro_batch: Whether the gradients of each micro batch are reduced, so that a rank keeps its rows
            alone. False: at the end of an optimizer step only, with whole gradients in float32 until then.
        timeout_minutes: How long a rank waits for the others before it gives up.
    """

    def __init__(
        self,
        reshard_vision: bool = True,
        reshard_llm: bool = True,
        shard_within_node: bool = False,
        sync_every_micro_batch: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        self.reshard_vision = reshard_vision
        self.reshard_llm = reshard_llm
        self.shard_within_node = shard_within_node
        self.sync_every_micro_batch = sync_every_micro_batch

    # The model is built, sharded and on its device when `configure_model` returns, so a checkpoint is restored at the
    # same moment as under other strategies: callbacks find the same state in their hooks.
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def device_mesh(self) -> DeviceMesh:
        """All ranks in one dimension; Lightning's own mesh has one of nodes and one of the ranks of a node."""
        return self._mesh

    def setup_environment(self) -> None:
        """Connect the ranks; raise a ConfigError where there is nothing to shard over within a node."""
        if self.shard_within_node and self.num_processes == 1 < self.num_nodes:
            raise ConfigError(
                "trainer.strategy: shard_within_node needs several devices a node, trainer.devices is 1; set it to "
                "false, or take strategy ddp, which keeps a copy on each device"
            )
        super().setup_environment()
        kind = self.root_device.type
        self._mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("data_parallel",))
        self._shard_mesh = self._mesh
        if self.shard_within_node and self.num_nodes > 1:
            shape = (self.num_nodes, self.num_processes)
            self._shard_mesh = init_device_mesh(kind, shape, mesh_dim_names=("copies", "shards"))

    def setup(self, trainer: pl.Trainer) -> None:
        evaluate_without_inference_mode(trainer)
        super().setup(trainer)

    def shard(self, model: nn.Module, load: Callable[[], None]) -> None:
        """Shard a model whose freeze table has been applied; `load` then reads each rank's rows.

        Raises a ConfigError for a precision that does not go with sharded weights.
        """
        precision = str(self.precision_plugin.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision={precision} does not go with a sharded model; use bf16-mixed or 32-true"
            )
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        kept = {"reshard_vision": self.reshard_vision, "reshard_llm": self.reshard_llm}
        shard(model, self._shard_mesh, policy=policy, **kept)
        self._sharded = model
        load()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within, forward and backward of a micro batch that does not end an optimizer step."""
        with gradients_kept(self._sharded, whole=not self.sync_every_micro_batch):
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        state, stored = self.lightning_module.state_dict(), checkpoint["state_dict"]
        for name, tensor in state.items():
            tensor.copy_(take_rows(stored[name], tensor))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {
                    key: take_rows(value, parameters[index]) if value.shape == parameters[index].shape else value
                    for key, value in values.items()
                }
                for index, values in stored["state"].items()
            }
            optimizer.load_state_dict({**stored, "state": state})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder beside its place and rename it; all ranks must call.

        A rank that cannot write is a CheckpointError on all ranks, and an earlier checkpoint is as it was.
        """
        path = Path(self.broadcast(str(filepath)))
        partial, rank, ranks = partial_path(path), self.global_rank, self.world_size
        own = rank_state(checkpoint, rank=rank)
        for on_all, action in (
            (False, lambda: _make_empty(partial)),
            (True, lambda: write_rank(partial, own, checkpoint, rank=rank, ranks=ranks)),
            (False, lambda: replace_path(partial, path)),
        ):
            problem = _catch_error(action) if on_all or rank == 0 else None
            if found := next(filter(None, gather(problem)), None):
                if rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(
                    f"could not write checkpoint {path}: {found}; the earlier one is as it was; free some space or set "
                    "another run_dir"
                )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder, or another strategy's file; this rank's values are taken when they are set."""
        path = Path(checkpoint_path)
        return read_folder(path) if path.is_dir() else load_file(path)


def evaluate_without_inference_mode(trainer: pl.Trainer) -> None:
    """Have evaluation run without `torch.inference_mode`, whose gathered tensors training cannot use again."""
    within_fit = trainer.fit_loop.epoch_loop.val_loop
    for loop in (within_fit, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def _catch_error(action: Callable[[], None]) -> str | None:
    try:
        action()
    except Exception as error:  # raised on all ranks, which would wait for this one otherwise
        return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def refuse_unknown(strategy: Strategy) -> None:
    """Raise a ConfigError for a strategy that shards in a way of its own."""
    known = isinstance(strategy, ShardedStrategy)
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)) and not known:
        raise unsupported(type(strategy).__name__)


def unsupported(strategy: str) -> ConfigError:
    """The refusal of a strategy, by its name."""
    return ConfigError(
        f"trainer.strategy {strategy} is not supported; configs/cluster/fsdp.yaml shards the model with "
        "alignvlm_pl.strategies.fsdp.ShardedStrategy"
    )
