"""Align with its products in chunks, as operators that torch's compiler and autograd take as they are.

`torch.library` operators rather than a bare `autograd.Function`: the compiler does not look into them, so that chunk
loops and reused buffers stay as written and a compiled model has no graph break. Only the inputs are saved for
backward; scores are computed again.
"""

from typing import Any

import torch
from torch import Tensor

from . import rows
from .mixture import Mixture
from .products import BUDGET_BYTES, Needs, Problem, backward, forward
from .rows import accumulating

_INPUTS = (
    "Tensor hidden, Tensor head_weight, Tensor gain, Tensor bias, Tensor? table, Tensor? columns, "
    "float eps, int budget, str kernels"
)


def mix_chunked(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    eps: float,
    columns: Tensor | None = None,
    budget: int = BUDGET_BYTES,
    kernels: str = "torch",
) -> Mixture:
    """Exact Align in chunks; other arguments as `ops.align_read`.

    Args:
        hidden: (N, D).
        head_weight: (V, D).
        gain: (V,).
        bias: (V,).
        table: (V, D) or None.
        eps: Epsilon of the vocabulary norm.
        columns: Ids to read out, or None.
        budget: Bytes of the two arrays (chunk, V) that are held.
        kernels: `torch` or `triton`: who computes between the products.
    """
    dtype = hidden.dtype if table is None else table.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
    embeds, log_probs = _align(hidden, head_weight, gain, bias, table, columns, eps, budget, kernels)
    return Mixture(
        None if table is None else embeds.to(dtype),
        None if columns is None else log_probs,
    )


def _kernels(name: str) -> Any:
    if name == "torch":
        return rows
    from . import triton_rows

    return triton_rows


def _problem(inputs: tuple[Any, ...]) -> Problem:
    hidden, head_weight, gain, bias, table, columns, eps, budget, kernels = inputs
    return Problem(
        hidden.contiguous(), head_weight, gain, bias, table, columns, eps, budget, _kernels(kernels)
    )


@torch.library.custom_op("alignvlm::align", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _align(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Embeddings and log-probabilities; an empty tensor stands for what is not asked for."""
    problem = _problem(inputs)
    with torch.autocast(problem.hidden.device.type, enabled=False):
        embeds, log_probs = forward(problem)
    nothing = problem.hidden.new_empty(0)
    return (
        nothing if embeds is None else embeds,
        nothing.to(problem.norm.gain.dtype) if log_probs is None else log_probs,
    )


@_align.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    hidden, table, columns, wide = inputs[0], inputs[4], inputs[5], accumulating(inputs[0].dtype)
    shape = (0,) if columns is None else (hidden.shape[0], columns.shape[0])
    embeds = hidden.new_empty(0 if table is None else (hidden.shape[0], table.shape[1]))
    return embeds, hidden.new_empty(shape, dtype=wide)


@torch.library.custom_op(
    "alignvlm::align_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? grad_embeds, Tensor? grad_log_probs, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _align_backward(*inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, W2, gain, bias and table; an empty tensor stands for one that is not wanted."""
    *own, grad_embeds, grad_log_probs, needs = inputs
    problem = _problem(tuple(own))
    with torch.autocast(problem.hidden.device.type, enabled=False):
        if grad_embeds is not None:
            grad_embeds = grad_embeds.to(problem.dtype).contiguous()
        if grad_log_probs is not None:
            grad_log_probs = grad_log_probs.to(problem.norm.gain.dtype)
        found = backward(problem, grad_embeds, grad_log_probs, Needs(*needs))
    return tuple(
        problem.hidden.new_empty(0) if gradient is None else gradient
        for gradient in (found.hidden, found.head_weight, found.gain, found.bias, found.table)
    )


@_align_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, head_weight, gain, bias, table = inputs[:5]
    needs = inputs[-1]
    wanted = (needs[0], needs[1], needs[2], needs[2], needs[3])
    return tuple(
        torch.empty_like(tensor) if want and tensor is not None else hidden.new_empty(0)
        for tensor, want in zip((hidden, head_weight, gain, bias, table), wanted, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_embeds: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Any, ...]:
    asked = ctx.needs_input_grad
    hidden, head_weight, gain, bias, table, columns = ctx.saved_tensors
    if table is None:
        grad_embeds = None
    if columns is None:
        grad_log_probs = None
    if grad_embeds is None and grad_log_probs is None:
        return (None,) * 9
    needs = [asked[0], asked[1], asked[2] or asked[3], asked[4]]
    inputs = (hidden, head_weight, gain, bias, table, columns, *ctx.settings)
    found = _align_backward(*inputs, grad_embeds, grad_log_probs, needs)
    gradients = [gradient if want else None for gradient, want in zip(found, asked[:5], strict=True)]
    return (*gradients, None, None, None, None)


_align.register_autograd(_gradients, setup_context=_save)
