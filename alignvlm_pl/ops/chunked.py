"""Align over chunks of visual tokens: seven matrix products, in memory that does not grow with the number of tokens.

Forward: scores and values. Backward: scores again, the gradient of the weights, then those of hidden, W2 and table.
Only the inputs are saved for backward. A chunk has whole rows of scores, because the norm's backward needs two means
over the vocabulary first; chunks of the vocabulary would take nine products, and the closed form Cov(W2) · h is
inaccurate where a row's mean is much larger than its deviation. Weights in another dtype than the products (float32
under autocast) are cast once a call, in 2 · V · D elements; their gradients are summed in their own dtype.

The operator is registered with `torch.library`, so a compiled model has no graph break and the loop stays as written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import norm_softmax
from .norm_softmax import NormGradients, VocabularyNorm, accumulation_dtype, slices
from .reference import AlignOutput

BUDGET_BYTES = 376 << 20
"""Default size on a CPU of the two arrays (chunk, V) together; peak memory with all temporaries stays below 0.5 GiB."""
_CUDA_SHARE, _CUDA_MOST = 32, 3 << 30
"""On a GPU the default is this part of its memory, in at most so many bytes: large products, few sums of gradients."""
_TOKENS = 128
"""Chunks are multiples of this many tokens, the tile of a matrix product, where the budget has room for one."""
_SLICE_BYTES = 32 << 20
"""Size of the slices in which a product is added to a gradient of another dtype."""


def default_budget(device: torch.device) -> int:
    """Return the bytes of the two arrays (chunk, V) together on a device, whatever of its memory is free."""
    if device.type != "cuda":
        return BUDGET_BYTES
    return gpu_budget(torch.cuda.get_device_properties(device).total_memory)


def gpu_budget(memory: int) -> int:
    """Return `default_budget` of a GPU with so many bytes."""
    return min(_CUDA_MOST, memory // _CUDA_SHARE)


@dataclass(frozen=True)
class _Inputs:
    """Arguments of the operator in the order of its schema, and its weights in the dtype of the products."""

    hidden: Tensor
    head_weight: Tensor
    gain: Tensor
    bias: Tensor
    table: Tensor | None
    columns: Tensor | None
    eps: float
    budget: int | None = None
    kernels: str = "torch"

    @cached_property
    def head(self) -> Tensor:
        return self.head_weight.to(self.hidden.dtype)

    @cached_property
    def values(self) -> Tensor:
        assert self.table is not None, "only called with a table"
        return self.table.to(self.hidden.dtype)

    @cached_property
    def norm(self) -> VocabularyNorm:
        dtype = accumulation_dtype(self.hidden.dtype)
        return VocabularyNorm(self.gain.to(dtype), self.bias.to(dtype), self.eps)

    @cached_property
    def norm_softmax(self) -> ModuleType:
        if self.kernels == "torch":
            return norm_softmax
        from . import norm_softmax_triton

        return norm_softmax_triton

    @cached_property
    def chunk_tokens(self) -> int:
        """Tokens per chunk; all chunks are about equal."""
        count, budget = len(self.hidden), self.budget or default_budget(self.hidden.device)
        held = max(1, budget // (2 * len(self.gain) * self.hidden.element_size()))
        unit = _TOKENS if held >= _TOKENS else 1
        chunks = max(1, -(-count // (held - held % unit)))
        return max(1, min(count, -(-count // (chunks * unit)) * unit))

    def chunks(self) -> Iterator[slice]:
        return slices(len(self.hidden), self.chunk_tokens)

    def new_buffer(self) -> Tensor:
        return self.hidden.new_empty((self.chunk_tokens, len(self.gain)))


@torch.no_grad()
def vocabulary_mass(hidden: Tensor, head_weight: Tensor, gain: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Return the sum (V,) of P_vocab over all tokens in float64; arguments as in `ops.align`."""
    inputs = _Inputs(hidden, head_weight, gain, bias, None, None, eps)
    buffer, mass = inputs.new_buffer(), torch.zeros(len(gain), dtype=torch.float64, device=hidden.device)
    for part in inputs.chunks():
        weights = buffer[: part.stop - part.start]
        torch.mm(hidden[part], inputs.head.t(), out=weights)
        norm_softmax.norm_softmax_(weights, inputs.norm, None)
        mass += weights.sum(dim=0, dtype=inputs.norm.gain.dtype)
    return mass


@cache
def _adds_into(device: torch.device, product: torch.dtype, total: torch.dtype) -> bool:
    """Whether `torch.addmm` adds a product to a matrix of another dtype: on CUDA, in late versions; found by trying."""
    left, found = torch.ones(16, 16, dtype=product, device=device), torch.ones(16, 16, dtype=total, device=device)
    try:
        torch.addmm(found, left, left, out_dtype=total, out=found)
    except (RuntimeError, TypeError):
        return False
    return bool((found == 17).all())


def _add_outer(left: Tensor, right: Tensor, *, out: Tensor, first: bool) -> None:
    """Add left (n, V)ᵀ · right (n, D) to `out` (V, D); the first chunk overwrites it.

    In half precision the sum is rounded after every chunk, as when gradients accumulate over micro batches.
    """
    beta = 0 if first else 1
    if out.dtype == left.dtype:
        torch.addmm(out, left.t(), right, beta=beta, out=out)
        return
    if _adds_into(out.device, left.dtype, out.dtype):
        torch.addmm(out, left.t(), right, out_dtype=out.dtype, beta=beta, out=out)
        return
    for part in slices(len(out), _SLICE_BYTES // max(1, out.shape[1] * out.element_size())):
        product = left[:, part].t() @ right
        if first:
            out[part] = product
        else:
            out[part].add_(product)  # `out[part] += product` would copy the sum onto itself once more


_INPUTS = (
    "Tensor hidden, Tensor head_weight, Tensor gain, Tensor bias, Tensor? table, Tensor? columns, "
    "float eps, int? budget, str kernels"
)


def align_chunked(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    eps: float,
    columns: Tensor | None = None,
    budget: int | None = None,
    kernels: str = "torch",
) -> AlignOutput:
    """Align over chunks of tokens, exact; as `ops.align`, with norm and softmax of `kernels`, `torch` or `triton`."""
    dtype = hidden.dtype if table is None else table.dtype
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # not on the meta device
        dtype = torch.get_autocast_dtype(kind)
        hidden = hidden.to(dtype)
    embeds, log_probs = _align(hidden.contiguous(), head_weight, gain, bias, table, columns, eps, budget, kernels)
    return AlignOutput(None if table is None else embeds.to(dtype), None if columns is None else log_probs)


@torch.library.custom_op("alignvlm::align", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _align(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return embeddings (N, D) and log P_vocab (N, C); empty where not requested: an operator cannot return None."""
    inputs = _Inputs(*arguments)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        return _forward(inputs)


def _forward(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    hidden, table, columns, norm = inputs.hidden, inputs.table, inputs.columns, inputs.norm
    (embeds, log_probs), buffer = _new_outputs(inputs), inputs.new_buffer()
    for part in inputs.chunks():
        scores = buffer[: part.stop - part.start]
        torch.mm(hidden[part], inputs.head.t(), out=scores)
        read = inputs.norm_softmax.norm_softmax_(scores, norm, columns)
        if read is not None:
            log_probs[part] = read
        if table is not None:
            torch.mm(scores, inputs.values, out=embeds[part])
    return embeds, log_probs


@_align.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _new_outputs(_Inputs(*arguments))


def _new_outputs(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    hidden, table, columns = inputs.hidden, inputs.table, inputs.columns
    embeds = hidden.new_empty(0 if table is None else (hidden.shape[0], table.shape[1]))
    read = 0 if columns is None else (hidden.shape[0], columns.shape[0])
    return embeds, hidden.new_empty(read, dtype=accumulation_dtype(hidden.dtype))


@torch.library.custom_op(
    "alignvlm::align_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? grad_embeds, Tensor? grad_log_probs, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _align_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of hidden, W2, gain, bias and table; an empty tensor where not needed."""
    *forward_arguments, grad_embeds, grad_log_probs, needs = arguments
    inputs = _Inputs(*forward_arguments)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        if grad_embeds is not None:
            grad_embeds = grad_embeds.to(inputs.hidden.dtype).contiguous()
        if grad_log_probs is not None:
            grad_log_probs = grad_log_probs.to(inputs.norm.gain.dtype)
        gradients = _backward(inputs, grad_embeds, grad_log_probs, needs)
    return tuple(inputs.hidden.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _backward(
    inputs: _Inputs, grad_embeds: Tensor | None, grad_log_probs: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the dtypes of the inputs; `needs`: those of hidden, W2, the norm and the table."""
    needs_hidden, needs_head, needs_norm, needs_table = needs
    needs_scores = needs_hidden or needs_head or needs_norm
    table, norm = inputs.table, inputs.norm
    embeds = grad_embeds is not None and table is not None
    new = torch.empty_like if len(inputs.hidden) else torch.zeros_like  # the first chunk fills what it adds to
    grad_hidden = torch.empty_like(inputs.hidden) if needs_hidden else None
    grad_head = new(inputs.head_weight) if needs_head else None
    grad_table = None
    if needs_table and table is not None:
        grad_table = new(table) if embeds else torch.zeros_like(table)
    total = NormGradients(torch.zeros_like(norm.gain), torch.zeros_like(norm.bias))
    buffer, weight_buffer = inputs.new_buffer(), inputs.new_buffer() if embeds and needs_scores else None
    for part in inputs.chunks():
        count, first = part.stop - part.start, part.start == 0
        hidden, scores = inputs.hidden[part], buffer[:count]
        torch.mm(hidden, inputs.head.t(), out=scores)
        grad_part = None if grad_embeds is None else grad_embeds[part]
        if not needs_scores:
            inputs.norm_softmax.norm_softmax_(scores, norm, None)
            weights: Tensor | None = scores
        else:
            weights = None if weight_buffer is None else weight_buffer[:count]
            if weights is not None and grad_part is not None:
                torch.mm(grad_part, inputs.values.t(), out=weights)
            logs = None if grad_log_probs is None else grad_log_probs[part]
            inputs.norm_softmax.norm_softmax_backward_(scores, weights, norm, total, inputs.columns, logs)
        if grad_table is not None and grad_part is not None and weights is not None:
            _add_outer(weights, grad_part, out=grad_table, first=first)
        if grad_hidden is not None:
            torch.mm(scores, inputs.head, out=grad_hidden[part])
        if grad_head is not None:
            _add_outer(scores, hidden, out=grad_head, first=first)
    grad_gain, grad_bias = total.gain.to(inputs.gain.dtype), total.bias.to(inputs.bias.dtype)
    return grad_hidden, grad_head, *((grad_gain, grad_bias) if needs_norm else (None, None)), grad_table


@_align_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, head_weight, gain, bias, table = arguments[:5]
    needs_hidden, needs_head, needs_norm, needs_table = arguments[-1]
    needs = (needs_hidden, needs_head, needs_norm, needs_norm, needs_table and table is not None)
    needed = zip((hidden, head_weight, gain, bias, table), needs, strict=True)
    return tuple(torch.empty_like(one) if need else hidden.new_empty(0) for one, need in needed)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_embeds: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Any, ...]:
    needed, saved = ctx.needs_input_grad, ctx.saved_tensors
    table, columns = saved[4:]
    grad_embeds = None if table is None else grad_embeds
    grad_log_probs = None if columns is None else grad_log_probs
    if grad_embeds is None and grad_log_probs is None:
        return (None,) * 9
    needs = [needed[0], needed[1], needed[2] or needed[3], needed[4]]
    gradients = _align_backward(*saved, *ctx.settings, grad_embeds, grad_log_probs, needs)
    return (*(gradient if need else None for gradient, need in zip(gradients, needed[:5], strict=True)), *[None] * 4)


_align.register_autograd(_gradients, setup_context=_save)
