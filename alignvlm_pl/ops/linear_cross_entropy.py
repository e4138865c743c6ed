"""Cross entropy of hidden states through an LM head, without holding the logits of all positions.

At a vocabulary of 128,256 the logits of 4,096 positions take 2.1 GB in float32, and a plain loss holds several copies.
Here those of one chunk of positions exist at a time, in forward and, recomputed, in backward. A head that is an
`nn.Linear` is called once, and the loss is computed inside that call, while FSDP has its parameters gathered. Any other
module, such as a head with an adapter, is called for each chunk.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, require_known
from .norm_softmax import slices
from .triton_probe import is_triton_device

BACKENDS = ("auto", "chunked", "liger", "plain")
CHUNK_LOGITS = 2**25
"""Number of logits per chunk on a CPU: 128 MiB in float32, 261 positions at a vocabulary of 128,256."""
CHUNK_LOGITS_CUDA = 2**26
"""The same on a GPU, 256 MiB, 523 positions: each chunk adds to the whole gradient of the head, in memory."""
LIGER = "liger-kernel>=0.7"


def check_loss_backend(name: str, *, device: str | None = None) -> None:
    """Raise a `ConfigError` if a name is not in `BACKENDS`, lacks its package or does not run on a type of device."""
    require_known(name, BACKENDS, f"loss_backend={name!r} is unknown")
    if name == "liger" and not _has_liger():
        raise ConfigError(
            f"loss_backend 'liger' needs the package liger-kernel: pip install '{LIGER}'; "
            "or set loss_backend: auto, which does not need it"
        )
    if name == "liger" and device is not None and not is_triton_device(device):
        raise ConfigError(f"loss_backend 'liger' needs a CUDA device, the model is on {device}; use loss_backend: auto")


@torch.compiler.disable
def head_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, *, backend: str = "auto", chunk_tokens: int | None = None
) -> Tensor:
    """Return the cross entropy (n,) of hidden states (n, D) through an LM head (n, D) -> (n, V) to target ids (n,).

    It is in float32, or in float64 for float64 hidden states, and has gradients for the hidden states and the head's
    trainable parameters. Excluded from torch.compile: the number of positions differs from batch to batch.

    The back-end `plain` holds all logits at once. `chunked` holds those of `chunk_tokens` positions, by default as many
    as have `CHUNK_LOGITS` logits (`CHUNK_LOGITS_CUDA`), and computes them twice. `liger` is Liger's fused kernel
    (CUDA). `auto`: `liger` on CUDA where it is installed and applies, else `plain` if all positions fit into one chunk,
    else `chunked`.

    Raises:
        ConfigError: The back-end is unknown or does not support this head, device or precision.
    """
    check_loss_backend(backend)
    # FSDP2's subclass keeps nn.Linear's forward; other subclasses may compute something else.
    linear = head if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward else None
    if chunk_tokens is None:
        # Other heads need not have `out_features`; 2^17 is the size of large vocabularies.
        logits = CHUNK_LOGITS_CUDA if hidden.is_cuda else CHUNK_LOGITS
        chunk_tokens = max(1, logits // int(getattr(linear or head, "out_features", 2**17)))
    if backend == "auto":
        in_one_call = len(hidden) <= chunk_tokens or (linear is None and isinstance(head, FSDPModule))
        fused = hidden.is_cuda and _has_liger() and not _liger_obstacle(hidden, linear)
        backend = "liger" if fused else "plain" if in_one_call else "chunked"
    if backend == "plain":
        return _plain(hidden, targets, head)
    if backend == "liger":
        if obstacle := _liger_obstacle(hidden, linear):
            raise ConfigError(f"loss_backend 'liger' {obstacle}; use loss_backend: auto")
        if len(hidden):
            return _inside_head(linear, hidden, lambda h, w, b: _liger(h, w, b, targets))
    if linear is None:
        return _call_per_chunk(hidden, targets, head, chunk_tokens)
    return _inside_head(linear, hidden, lambda h, w, b: _Chunked.apply(h, w, b, targets, chunk_tokens))


def _plain(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return F.cross_entropy(_at_least_float32(head(hidden)), targets, reduction="none")


def _call_per_chunk(hidden: Tensor, targets: Tensor, head: nn.Module, chunk_tokens: int) -> Tensor:
    """Call any head that is not sharded once per chunk; each chunk is recomputed in backward."""
    if isinstance(head, FSDPModule):
        raise ConfigError(
            f"loss_backend 'chunked' cannot call a sharded {type(head).__name__.removeprefix('FSDP')} chunk by chunk, "
            "because ranks with more tokens would wait for the others; use loss_backend: plain, or a head that is "
            "an nn.Linear"
        )
    parts = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(_plain, h, t, head, use_reentrant=False) for h, t in parts])


class _Chunked(torch.autograd.Function):
    """Losses of a linear head. Only the arguments are saved for backward, so memory is that of one chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk_tokens: int
    ) -> Tensor:
        dtype = compute_dtype(hidden)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk_tokens, ctx.dtype = chunk_tokens, dtype
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        with _no_autocast(hidden):
            w, b = _cast(weight, dtype), _cast(bias, dtype)
            for part in slices(len(hidden), chunk_tokens):
                logits = F.linear(hidden[part].to(dtype), w, b)
                losses[part] = F.cross_entropy(_at_least_float32(logits), targets[part], reduction="none")
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        dtype = ctx.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # Sums over chunks are in float32 at least: in bfloat16 every chunk would round the sum.
        total = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=total) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=total) if needs_bias else None
        with _no_autocast(hidden):
            w, b = _cast(weight, dtype), _cast(bias, dtype)
            for part in slices(len(hidden), ctx.chunk_tokens):
                states = hidden[part].to(dtype)
                # d loss / d logits = softmax(logits) - onehot(target)
                grad_logits = _at_least_float32(F.linear(states, w, b)).softmax(dim=-1)
                grad_logits[torch.arange(len(grad_logits), device=grad_logits.device), targets[part]] -= 1
                grad_logits = grad_logits.mul_(grad[part, None]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad_logits @ w
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.t(), states)
                elif grad_weight is not None:
                    grad_weight += grad_logits.t() @ states
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(dim=0, dtype=total)
        return grad_hidden, _cast(grad_weight, weight.dtype), _cast(grad_bias, weight.dtype), None, None


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Losses (n,) by Liger's fused kernel, for a gradient that is the same for all: releases before 0.8 need that."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # The casts are part of the graph, so gradients have the dtypes of the parameters.
    dtype = compute_dtype(hidden)
    w, b = _cast(weight, dtype), _cast(bias, dtype)
    with _no_autocast(hidden):
        losses: Tensor = liger_fused_linear_cross_entropy(
            hidden.to(dtype), w, targets, bias=b, reduction="none", accum_dtype=torch.float32
        )
    return losses


def _liger_obstacle(hidden: Tensor, linear: nn.Linear | None) -> str | None:
    """Return why Liger's kernel does not apply, or None."""
    if not is_triton_device(hidden.device.type):
        return f"needs a CUDA device, the model is on {hidden.device.type}"
    if linear is None:
        return "supports only an LM head that is an nn.Linear"
    if compute_dtype(hidden) == torch.float64:
        return "computes in float32 at most, the model in float64"
    trained = any(parameter.requires_grad for parameter in linear.parameters())
    if torch.is_grad_enabled() and trained and not hidden.requires_grad:
        return "gives the LM head no gradient where nothing below it trains"
    return None


def _has_liger() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


def _inside_head(linear: nn.Linear | None, hidden: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """Return `loss(hidden, weight, bias)`, computed inside a call of the head, so that hooks (FSDP's) run around it."""
    assert linear is not None
    before = vars(linear).get("forward")  # set by other code
    linear.forward = lambda input: loss(input, linear.weight, linear.bias)  # type: ignore[method-assign]
    try:
        losses: Tensor = linear(hidden)
    finally:
        del linear.forward
        if before is not None:
            linear.forward = before  # type: ignore[method-assign]
    return losses


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that products of `hidden` are computed in: autocast's if it is enabled, else its own."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _no_autocast(hidden: Tensor) -> torch.autocast:
    return torch.autocast(hidden.device.type, enabled=False)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
