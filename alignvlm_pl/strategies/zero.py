"""DeepSpeed's ZeRO as a Lightning strategy, with this project's loss normalisation and checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigError
from .folder_checkpoints import FolderCheckpoints, evaluate_without_inference_mode
from .sharded_checkpoint import Piece, make_whole, take_values
from .zero_parameters import is_partitioned, own_piece, whole_shape
from .zero_state import ZeroState

STAGES = (2, 3)


class ZeroStrategy(FolderCheckpoints, DeepSpeedStrategy):
    """ZeRO: the ranks share out gradients and AdamW's state (stage 2), weights as well (stage 3). CUDA only.

    With `precision: bf16-mixed` weights are bfloat16, and AdamW keeps float32 copies of its share.

    Args:
        stage: 2 or 3.
        whole_below: Stage 3 keeps parameters of up to so many elements whole on every rank between the steps.

    Raises:
        ConfigError: The package deepspeed is not installed, or there is no such stage.
    """

    def __init__(self, stage: int = 2, whole_below: int = 100_000) -> None:
        require_deepspeed()
        if stage not in STAGES:
            raise ConfigError(f"trainer.strategy: ZeRO stage {stage}: expected one of {STAGES}")
        super().__init__(stage=stage, logging_batch_size_per_gpu=1)
        assert isinstance(self.config, dict)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = whole_below
        self._groups: list[list[nn.Parameter]] = []
        self._partitioned: Any = None  # the first parameter that was

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the module asks for `shard`.

        Raises:
            ConfigError: The precision needs a loss scale, whose place the step's tokens take here.
        """
        precision = str(self.precision_plugin.precision)
        if precision.startswith("16"):
            raise ConfigError(f"trainer.precision={precision} does not go with ZeRO; use bf16-mixed")
        self._init_config_if_needed()
        yield

    def setup(self, trainer: pl.Trainer) -> None:
        """As Lightning; evaluation of a sharded model without `torch.inference_mode`."""
        if self.zero_stage_3:
            evaluate_without_inference_mode(trainer)
            assert self.lightning_module is not None
            self.lightning_module.to(self.root_device)  # its buffers, which DeepSpeed leaves where they are
        super().setup(trainer)
        if self.zero_stage_3:
            net: Any = trainer.lightning_module.net
            net.forget_order = self._forget_order  # CONTRACT: sharding.gathered_parts calls it

    def _forget_order(self) -> None:
        """Have DeepSpeed learn anew in which order modules run; all ranks must call.

        It gathers ahead by that order, and holds ranks to the same one: to be called where they may differ.
        """
        engine = self.deepspeed_engine
        coordinator = getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def shard(self, model: Any, load: Callable[[Callable[[nn.Parameter], None]], None]) -> None:
        """Load a model that was built on the meta device, each parameter cut as soon as it is there (stage 3).

        Args:
            model: An `AlignVLMForConditionalGeneration` whose freeze table has been applied.
            load: Loads its weights, and hands each new parameter to the function that it is given.
        """
        import deepspeed

        register = deepspeed.zero.register_external_parameter
        load(self._cut)
        for parameter in model.parameters():  # those that no file had
            self._cut(parameter)
        # Read by others than the modules that own them: gathered while these run.
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            register(model, part.weight)
        for parameter in model.connector.parameters():
            register(model.connector, parameter)
        if hasattr(model.connector, "log_probs"):
            _run_as_forward(model.connector, "log_probs")

    def _cut(self, parameter: nn.Parameter) -> None:
        """Keep this rank's piece of a parameter."""
        import deepspeed

        if is_partitioned(parameter):
            return
        if str(self.precision_plugin.precision).startswith("bf16"):
            parameter.data = parameter.data.to(torch.bfloat16)
        if self._partitioned is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=self.config)
            self._partitioned = parameter
        else:
            self._partitioned.convert_to_zero_parameters(param_list=[parameter])

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        assert optimizer is not None
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def teardown(self) -> None:
        """As Lightning; a sharded model stays where it is."""
        self._groups, self._partitioned = [], None  # they lead to the optimizer's state
        if not self.zero_stage_3:
            return super().teardown()
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK.clear()  # it would keep the model for good
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **options: Any
    ) -> Tensor:
        """As Lightning, which has divided the loss by the accumulation already; DeepSpeed would a second time."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **options)

    def divide_gradients(self, number: Tensor) -> None:
        """Have the next step divide the gradients, which DeepSpeed keeps to itself, before it clips them."""
        # They are divided by the loss's scale. The losses were not multiplied by it, so it is set for the step alone.
        self.deepspeed_engine.optimizer.override_loss_scale(float(number))

    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of the undivided gradients of each part, after the backward of the last micro batch; all ranks."""
        return self._state().gradient_norms()

    def optimizer_step(self, *args: Any, **options: Any) -> Any:
        """As Lightning, then loss and gradients are unscaled again."""
        result = super().optimizer_step(*args, **options)
        self.deepspeed_engine.optimizer.custom_loss_scaler = False
        return result

    # Checkpoints hold what a run without ZeRO would have, cut: weights in float32 where they train, AdamW's state.
    @property
    def lightning_restore_optimizer(self) -> bool:
        """True."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state; this rank's piece of what is shared out."""
        state = self._state()
        pieces: dict[int, Any] = {}  # a tied one is the same piece under both names
        found = {}
        for name, value in self._tensors().items():
            if id(value) not in pieces:
                if value in state:
                    pieces[id(value)] = state.weights(value)
                elif is_partitioned(value):
                    pieces[id(value)] = Piece(own_piece(value)[0].cpu(), whole_shape(value))
                else:
                    pieces[id(value)] = value.detach()
            found[name] = pieces[id(value)]
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's state; this rank's pieces."""
        return self._state().state_dict()

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's values of the checkpoint, whichever strategy wrote it."""
        state = self._state()
        for name, value in self._tensors().items():
            stored = checkpoint["state_dict"][name]
            if is_partitioned(value):
                own, start = own_piece(value)
                own.copy_(take_values(stored, start, start + len(own)))
                value.partition()  # a whole copy is out of date
            else:
                value.detach().copy_(make_whole(stored))
            if value in state:
                state.set_weights(value, stored)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's values of AdamW's state."""
        self._state().load_state_dict(checkpoint["optimizer_states"][0])

    def _state(self) -> ZeroState:
        """Of no parameter where nothing trains."""
        return ZeroState(self.optimizers[0] if self._groups else None, self._groups)

    def _tensors(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        found: dict[str, Any] = self.lightning_module.state_dict(keep_vars=True)
        return found


def _run_as_forward(module: Any, name: str) -> None:
    """Have a method run as `forward` does, with the hooks that gather parameters."""
    method = getattr(module, name)

    def run(*args: Any, **options: Any) -> Any:
        module.forward = method
        try:
            return module(*args, **options)
        finally:
            del module.forward

    setattr(module, name, run)


def require_deepspeed() -> None:
    """Refuse ZeRO where its package is missing.

    Raises:
        ConfigError: It is; saying how to install it.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "trainer.strategy: ZeRO needs the package deepspeed: pip install 'deepspeed>=0.19'; "
            "configs/cluster/fsdp.yaml does without"
        )
