"""Align over chunks of visual tokens: seven matrix products, in memory that does not grow with the number of tokens.

Forward: scores and values. Backward: scores again, the gradient of the weights, then those of hidden, W2 and table.
Only the inputs are saved for backward. A chunk has whole rows of scores, because the norm's backward needs two means
over the vocabulary first; chunks of the vocabulary would take nine products, and the closed form Cov(W2) · h is
inaccurate where the mean of a row of scores is much larger than its deviation. Two arrays (chunk, V) are allocated and
reused. Weights in another dtype than the products (autocast) are cast in slices of the vocabulary.

The operator is registered with `torch.library`: the compiler does not trace into it, so a compiled model has no graph
break, and the chunk loop and its reused buffers stay as written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import norm_softmax
from .norm_softmax import NormGradients, VocabularyNorm, accumulation_dtype
from .reference import AlignOutput

BUDGET_BYTES = 376 << 20
"""Default size of the two arrays (chunk, V) together; peak memory with all temporaries stays below 0.5 GiB."""

_CAST_BYTES = 32 << 20


@dataclass(frozen=True)
class AlignInputs:
    """Inputs of one call of the operator.

    Args:
        hidden: (N, D); the matrix products run in its dtype.
        head_weight: (V, D) W2.
        gain: (V,) gain of the vocabulary norm.
        bias: (V,) bias of the vocabulary norm.
        table: (V, D) text embeddings, or None to compute log-probabilities only.
        columns: (C,) rows of the vocabulary whose log-probabilities to return, or None.
        eps: Epsilon of the vocabulary norm.
        budget: Bytes of the two arrays (chunk, V) together.
        kernels: Module with `norm_softmax_` and `norm_softmax_backward_`.
    """

    hidden: Tensor
    head_weight: Tensor
    gain: Tensor
    bias: Tensor
    table: Tensor | None
    columns: Tensor | None
    eps: float
    budget: int
    kernels: ModuleType = norm_softmax

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return self.hidden.dtype

    @cached_property
    def norm(self) -> VocabularyNorm:
        """Parameters of the vocabulary norm in the accumulation dtype."""
        dtype = accumulation_dtype(self.dtype)
        return VocabularyNorm(self.gain.to(dtype), self.bias.to(dtype), self.eps)

    @cached_property
    def chunk_tokens(self) -> int:
        """Tokens per chunk; all chunks are about equal."""
        rows_held = max(1, self.budget // (2 * len(self.gain) * self.hidden.element_size()))
        chunks = max(1, -(-len(self.hidden) // rows_held))
        return max(1, -(-len(self.hidden) // chunks))

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens, one per chunk."""
        for start in range(0, len(self.hidden), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, len(self.hidden)))

    def new_buffer(self) -> Tensor:
        """Allocate an array (chunk, V)."""
        return self.hidden.new_empty((self.chunk_tokens, len(self.gain)))


@dataclass(frozen=True)
class NeededGradients:
    """Which inputs need a gradient."""

    hidden: bool
    head_weight: bool
    norm: bool
    table: bool

    @property
    def scores(self) -> bool:
        """Whether an input of the softmax needs a gradient."""
        return self.hidden or self.head_weight or self.norm


@dataclass(frozen=True)
class InputGradients:
    """Gradients in the dtypes of their inputs; None where not needed."""

    hidden: Tensor | None
    head_weight: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    table: Tensor | None


def forward(inputs: AlignInputs) -> tuple[Tensor | None, Tensor | None]:
    """Compute the embeddings (N, D) in the products' dtype and log P_vocab (N, C); None for what was not requested."""
    hidden, table = inputs.hidden, inputs.table
    embeds = None if table is None else hidden.new_empty((len(hidden), table.shape[1]))
    buffer, logs = inputs.new_buffer(), []
    for part in inputs.chunks():
        scores = buffer[: part.stop - part.start]
        _matmul_transposed(hidden[part], inputs.head_weight, out=scores)
        logs.append(inputs.kernels.norm_softmax_(scores, inputs.norm, inputs.columns))
        if embeds is not None and table is not None:
            _matmul(scores, table, out=embeds[part])
    if inputs.columns is None:
        return embeds, None
    return embeds, torch.cat(logs) if logs else inputs.norm.gain.new_zeros((0, len(inputs.columns)))


def backward(
    inputs: AlignInputs, grad_embeds: Tensor | None, grad_log_probs: Tensor | None, needs: NeededGradients
) -> InputGradients:
    """Compute the gradients of the inputs from those of the outputs, either of which may be None."""
    embeds = grad_embeds is not None and inputs.table is not None
    grad_hidden = torch.zeros_like(inputs.hidden) if needs.hidden else None
    grad_head = _zeros_or_empty(inputs, inputs.head_weight) if needs.head_weight else None
    grad_table = None
    if needs.table and inputs.table is not None:
        grad_table = _zeros_or_empty(inputs, inputs.table) if embeds else torch.zeros_like(inputs.table)
    total = NormGradients(torch.zeros_like(inputs.norm.gain), torch.zeros_like(inputs.norm.bias))
    buffer, weight_buffer = inputs.new_buffer(), inputs.new_buffer() if embeds and needs.scores else None
    for part in inputs.chunks():
        count, first = part.stop - part.start, part.start == 0
        hidden, scores = inputs.hidden[part], buffer[:count]
        _matmul_transposed(hidden, inputs.head_weight, out=scores)
        grad_part = None if grad_embeds is None else grad_embeds[part]
        if not needs.scores:
            inputs.kernels.norm_softmax_(scores, inputs.norm, None)
            weights: Tensor | None = scores
        else:
            weights = None if weight_buffer is None else weight_buffer[:count]
            if weights is not None and grad_part is not None and inputs.table is not None:
                _matmul_transposed(grad_part, inputs.table, out=weights)
            logs = None if grad_log_probs is None else grad_log_probs[part]
            inputs.kernels.norm_softmax_backward_(scores, weights, inputs.norm, total, inputs.columns, logs)
        if grad_table is not None and grad_part is not None and weights is not None:
            _add_outer(weights, grad_part, out=grad_table, first=first)
        if grad_hidden is not None:
            _matmul(scores, inputs.head_weight, out=grad_hidden[part])
        if grad_head is not None:
            _add_outer(scores, hidden, out=grad_head, first=first)
    return InputGradients(
        grad_hidden,
        grad_head,
        total.gain.to(inputs.gain.dtype) if needs.norm else None,
        total.bias.to(inputs.bias.dtype) if needs.norm else None,
        grad_table,
    )


@torch.no_grad()
def vocabulary_mass(hidden: Tensor, head_weight: Tensor, gain: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Sum P_vocab over all tokens: the probability mass of each row of the vocabulary.

    Args:
        hidden: (N, D) hidden states after W1 and its norm.
        head_weight: (V, D) W2.
        gain: (V,) gain of the vocabulary norm.
        bias: (V,) bias of the vocabulary norm.
        eps: Epsilon of the vocabulary norm.

    Returns:
        (V,) in float64.
    """
    inputs = AlignInputs(hidden, head_weight, gain, bias, None, None, eps, BUDGET_BYTES)
    buffer, mass = inputs.new_buffer(), torch.zeros(len(gain), dtype=torch.float64, device=hidden.device)
    for part in inputs.chunks():
        weights = buffer[: part.stop - part.start]
        _matmul_transposed(hidden[part], head_weight, out=weights)
        norm_softmax.norm_softmax_(weights, inputs.norm, None)
        mass += weights.sum(dim=0, dtype=inputs.norm.gain.dtype)
    return mass


def _zeros_or_empty(inputs: AlignInputs, weight: Tensor) -> Tensor:
    """Allocate a gradient; the first chunk fills it, so it is zeroed only where there is no chunk."""
    return torch.empty_like(weight) if len(inputs.hidden) else torch.zeros_like(weight)


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight in `dtype`: all at once if it has that dtype, else cast in slices."""
    step = len(weight)
    if weight.dtype != dtype:
        step = max(1, _CAST_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        yield part, weight[part].to(dtype)


def _matmul_transposed(left: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Write left (n, D) · weight (V, D)ᵀ to `out` (n, V)."""
    for part, rows in _slices(weight, left.dtype):
        torch.mm(left, rows.t(), out=out[:, part])


def _matmul(left: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Write left (n, V) · weight (V, D) to `out` (n, D); slices are summed in the accumulation dtype."""
    if weight.dtype == left.dtype:
        torch.mm(left, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=accumulation_dtype(left.dtype), device=out.device)
    for part, rows in _slices(weight, left.dtype):
        total += left[:, part] @ rows
    out.copy_(total)


def _add_outer(left: Tensor, right: Tensor, *, out: Tensor, first: bool) -> None:
    """Add left (n, V)ᵀ · right (n, D) to `out` (V, D); the first chunk overwrites it.

    In half precision the sum is rounded after every chunk, as when gradients accumulate over micro batches.
    """
    if out.dtype == left.dtype:
        torch.addmm(out, left.t(), right, beta=0 if first else 1, out=out)
        return
    step = max(1, _CAST_BYTES // max(1, out.shape[1] * out.element_size()))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        product = left[:, part].t() @ right
        if first:
            out[part] = product
        else:
            out[part] += product


_INPUTS = (
    "Tensor hidden, Tensor head_weight, Tensor gain, Tensor bias, Tensor? table, Tensor? columns, "
    "float eps, int budget, str kernels"
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
    budget: int = BUDGET_BYTES,
    kernels: str = "torch",
) -> AlignOutput:
    """Align over chunks of tokens, exact; arguments and output as in `ops.align_read`, but for those below.

    Args:
        hidden: (N, D).
        head_weight: (V, D).
        gain: (V,).
        bias: (V,).
        table: (V, D) or None.
        eps: Epsilon of the vocabulary norm.
        columns: (C,) or None.
        budget: Bytes of the two arrays (chunk, V) together.
        kernels: `torch` or `triton`: implementation of norm and softmax.
    """
    dtype = hidden.dtype if table is None else table.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
    embeds, log_probs = _align(hidden, head_weight, gain, bias, table, columns, eps, budget, kernels)
    return AlignOutput(
        None if table is None else embeds.to(dtype),
        None if columns is None else log_probs,
    )


def _kernels(name: str) -> Any:
    if name == "torch":
        return norm_softmax
    from . import norm_softmax_triton

    return norm_softmax_triton


def _align_inputs(arguments: tuple[Any, ...]) -> AlignInputs:
    hidden, head_weight, gain, bias, table, columns, eps, budget, kernels = arguments
    return AlignInputs(hidden.contiguous(), head_weight, gain, bias, table, columns, eps, budget, _kernels(kernels))


@torch.library.custom_op("alignvlm::align", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _align(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Embeddings and log-probabilities; an empty tensor where not requested (an operator cannot return None)."""
    inputs = _align_inputs(arguments)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        embeds, log_probs = forward(inputs)
    nothing = inputs.hidden.new_empty(0)
    return (
        nothing if embeds is None else embeds,
        nothing.to(inputs.norm.gain.dtype) if log_probs is None else log_probs,
    )


@_align.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, table, columns = arguments[0], arguments[4], arguments[5]
    shape = (0,) if columns is None else (hidden.shape[0], columns.shape[0])
    embeds = hidden.new_empty(0 if table is None else (hidden.shape[0], table.shape[1]))
    return embeds, hidden.new_empty(shape, dtype=accumulation_dtype(hidden.dtype))


@torch.library.custom_op(
    "alignvlm::align_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? grad_embeds, Tensor? grad_log_probs, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _align_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden, W2, gain, bias and table; an empty tensor where not needed."""
    *forward_arguments, grad_embeds, grad_log_probs, needs = arguments
    inputs = _align_inputs(tuple(forward_arguments))
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        if grad_embeds is not None:
            grad_embeds = grad_embeds.to(inputs.dtype).contiguous()
        if grad_log_probs is not None:
            grad_log_probs = grad_log_probs.to(inputs.norm.gain.dtype)
        gradients = backward(inputs, grad_embeds, grad_log_probs, NeededGradients(*needs))
    return tuple(
        inputs.hidden.new_empty(0) if gradient is None else gradient
        for gradient in (
            gradients.hidden,
            gradients.head_weight,
            gradients.gain,
            gradients.bias,
            gradients.table,
        )
    )


@_align_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, head_weight, gain, bias, table = arguments[:5]
    needs = arguments[-1]
    needed = (needs[0], needs[1], needs[2], needs[2], needs[3])
    return tuple(
        torch.empty_like(tensor) if need and tensor is not None else hidden.new_empty(0)
        for tensor, need in zip((hidden, head_weight, gain, bias, table), needed, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_embeds: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    hidden, head_weight, gain, bias, table, columns = ctx.saved_tensors
    if table is None:
        grad_embeds = None
    if columns is None:
        grad_log_probs = None
    if grad_embeds is None and grad_log_probs is None:
        return (None,) * 9
    needs = [needed[0], needed[1], needed[2] or needed[3], needed[4]]
    inputs = (hidden, head_weight, gain, bias, table, columns, *ctx.settings)
    gradients = _align_backward(*inputs, grad_embeds, grad_log_probs, needs)
    masked = [gradient if need else None for gradient, need in zip(gradients, needed[:5], strict=True)]
    return (*masked, None, None, None, None)


_align.register_autograd(_gradients, setup_context=_save)
