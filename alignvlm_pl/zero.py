"""DeepSpeed's ZeRO as a Lightning strategy, with this project's loss normalisation and whole checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from .errors import CheckpointError, ConfigError
from .sharded_checkpoint import replace_path


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO stage 2: gradients and AdamW's state are shared out over the ranks, each has all weights. CUDA only.

    With `precision: bf16-mixed` weights are bfloat16, and AdamW keeps float32 copies of its share.

    Raises:
        ConfigError: The package deepspeed is not installed.
    """

    def __init__(self) -> None:
        require_deepspeed()
        super().__init__(stage=2, logging_batch_size_per_gpu=1)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the model is built and loaded whole."""
        self._init_config_if_needed()
        yield

    def divide_gradients(self, number: Tensor) -> None:
        """Have the next step divide the gradients, which DeepSpeed keeps to itself, before it clips them."""
        # They are divided by the loss's scale. The losses were not multiplied by it, so it is set for the step alone.
        self.deepspeed_engine.optimizer.override_loss_scale(float(number))

    def optimizer_step(self, *args: Any, **options: Any) -> Any:
        """As Lightning, then loss and gradients are unscaled again."""
        result = super().optimizer_step(*args, **options)
        self.deepspeed_engine.optimizer.custom_loss_scaler = False
        return result

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write DeepSpeed's folder beside its place and rename it; all ranks must call."""
        path = Path(self.broadcast(str(filepath)))
        partial = path.with_name(path.name + ".partial")
        super().save_checkpoint(checkpoint, partial, storage_options=storage_options)
        self.barrier("checkpoint written")
        if self.is_global_zero:
            replace_path(partial, path)
        self.barrier("checkpoint in place")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning.

        Raises:
            CheckpointError: It was written by another strategy.
        """
        if not (Path(checkpoint_path) / "latest").is_file():
            raise CheckpointError(
                f"checkpoint {checkpoint_path} was not written by ZeRO, which reads no other; go on with the strategy "
                "that wrote it, or start the stage again in another run_dir"
            )
        found: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return found


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
