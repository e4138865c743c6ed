"""Activation checkpointing and `torch.compile` per part of the model."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..errors import require_known
from ..strategies.sharding import layers
from .stage import PARTS

CHECKPOINTED = ("vision", "llm")  # Parts with repeated layers
_COMPILE_BACKEND = "inductor"


def check_parts(setting: str, parts: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Return the parts named by a setting; raise a ConfigError for one that is not in `known`."""
    for part in parts or ():
        require_known(part, known, f"model.{setting} names {part!r}")
    return tuple(parts or ())


def checkpoint_activations(model: nn.Module, parts: Sequence[str]) -> None:
    """Have the layers of these parts (`CHECKPOINTED`) keep their inputs alone, and run again in backward, in place."""
    for part in parts:
        for layer in layers(getattr(model, PARTS[part])):
            layer.forward = _recompute_in_backward(layer.forward)


def compile_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Compile these parts (`PARTS`) in place: each layer of a tower, the connector; parameter names do not change."""
    for part in parts:
        module = getattr(model, PARTS[part])
        for compiled in layers(module) if part in CHECKPOINTED else [module]:
            compiled.compile(backend=_COMPILE_BACKEND)


def skip_constant_buffers(ddp: DistributedDataParallel) -> None:
    """Have DDP not send buffers in each forward, unless some that are saved may change, such as running statistics."""
    saved = ddp.state_dict().keys()
    if not any(name in saved and buffer.is_floating_point() for name, buffer in ddp.named_buffers()):
        ddp.broadcast_buffers = False


def choose_matmul_precision(device: str, precision: str) -> None:
    """Take TF32 for what autocast to bfloat16 leaves in float32, on CUDA; it is more exact than bfloat16."""
    if device == "cuda" and precision == "bf16-mixed":
        torch.set_float32_matmul_precision("high")


def _recompute_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A frozen LLM in eval mode is checkpointed too, since gradients flow through it to the connector.
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
