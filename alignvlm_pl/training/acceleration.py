"""Activation checkpointing and `torch.compile`, chosen for each part of the model."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, nearest
from ..strategies.sharding import layers
from .stage import PARTS

CHECKPOINTED = ("vision", "llm")
"""Parts that have repeated layers."""
_COMPILE_BACKEND = "inductor"


def check_parts(setting: str, parts: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The parts that a setting names.

    Raises:
        ConfigError: One is unknown.
    """
    for part in parts or ():
        if part not in known:
            raise ConfigError(f"model.{setting} names {part!r}: {nearest(part, known)}")
    return tuple(parts or ())


def checkpoint_activations(model: nn.Module, parts: Sequence[str]) -> None:
    """Keep only the inputs of the layers of these parts, and run each again in backward.

    CONTRACT: called before the model is sharded or compiled, so that parameters are gathered around both runs.

    Args:
        model: An `AlignVLMForConditionalGeneration`.
        parts: Of `CHECKPOINTED`.
    """
    for part in parts:
        for layer in layers(getattr(model, PARTS[part])):
            layer.forward = _run_again_in_backward(layer.forward)


def compile_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Compile these parts where they are: each layer of towers, the connector as a whole.

    Names of parameters stay as they are. The first step of every new shape takes longer.

    Args:
        model: An `AlignVLMForConditionalGeneration`.
        parts: Of `PARTS`.
    """
    for part in parts:
        module = getattr(model, PARTS[part])
        for piece in layers(module) if part in CHECKPOINTED else [module]:
            piece.compile(backend=_COMPILE_BACKEND)


def _run_again_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A frozen LLM, which is in eval mode, passes gradients on to the connector and is run again all the same.
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
