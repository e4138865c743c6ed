"""The seven matrix products of Align over chunks of visual tokens, in memory that their number does not change.

Forward: scores and values. Backward: scores again, gradient of the weights, then gradients of hidden, W2 and table.
A chunk has whole rows of scores, because the norm's backward needs two means over the vocabulary before anything else
can be computed; with chunks of the vocabulary alone that would take two more products (9 for 7), and the closed form
Cov(W2) · h is wrong where the mean of a row of scores is much larger than its deviation. Two arrays (chunk, V) are all
that is held, and they are reused.

Weights of another dtype than the products (autocast) are cast in slices of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from . import rows
from .rows import Norm, NormGradient, accumulating

BUDGET_BYTES = 376 << 20
"""Of the two arrays (chunk, V). With blocks, casts and the library's own buffers the whole stays below 0.5 GiB."""

_CAST_BYTES = 32 << 20


@dataclass(frozen=True)
class Problem:
    """One call of the operator.

    Args:
        hidden: (N, D); its dtype is that of the products.
        head_weight: W2, (V, D).
        gain: (V,) of the vocabulary norm.
        bias: (V,) likewise.
        table: (V, D), or None where only log-probabilities are wanted.
        columns: Ids to read out, or None.
        eps: Epsilon of the vocabulary norm.
        budget: Bytes of the two arrays (chunk, V).
        kernels: Module with `weights_` and `gradients_`, as `rows`.
    """

    hidden: Tensor
    head_weight: Tensor
    gain: Tensor
    bias: Tensor
    table: Tensor | None
    columns: Tensor | None
    eps: float
    budget: int
    kernels: ModuleType = rows

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return self.hidden.dtype

    @cached_property
    def norm(self) -> Norm:
        """The vocabulary norm in the accumulating dtype."""
        wide = accumulating(self.dtype)
        return Norm(self.gain.to(wide), self.bias.to(wide), self.eps)

    @cached_property
    def chunk(self) -> int:
        """Tokens of a chunk; all chunks are about equal."""
        rows_held = max(1, self.budget // (2 * len(self.gain) * self.hidden.element_size()))
        chunks = max(1, -(-len(self.hidden) // rows_held))
        return max(1, -(-len(self.hidden) // chunks))

    def chunks(self) -> Iterator[slice]:
        """Chunks of the tokens."""
        for start in range(0, len(self.hidden), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.hidden)))

    def array(self) -> Tensor:
        """An array (chunk, V) to work in."""
        return self.hidden.new_empty((self.chunk, len(self.gain)))


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    head_weight: bool
    norm: bool
    table: bool

    @property
    def scores(self) -> bool:
        """Whether anything before the softmax has a gradient."""
        return self.hidden or self.head_weight or self.norm


@dataclass(frozen=True)
class Gradients:
    """Gradients in the dtypes of what they belong to; None where not wanted."""

    hidden: Tensor | None
    head_weight: Tensor | None
    gain: Tensor | None
    bias: Tensor | None
    table: Tensor | None


def forward(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings (N, width of the table) in the products' dtype, and log P_vocab (N, columns)."""
    hidden, table = problem.hidden, problem.table
    embeds = None if table is None else hidden.new_empty((len(hidden), table.shape[1]))
    held, logs = problem.array(), []
    for part in problem.chunks():
        scores = held[: part.stop - part.start]
        _against(hidden[part], problem.head_weight, out=scores)
        logs.append(problem.kernels.weights_(scores, problem.norm, problem.columns))
        if embeds is not None and table is not None:
            _onto(scores, table, out=embeds[part])
    if problem.columns is None:
        return embeds, None
    return embeds, torch.cat(logs) if logs else problem.norm.gain.new_zeros((0, len(problem.columns)))


def backward(
    problem: Problem, grad_embeds: Tensor | None, grad_log_probs: Tensor | None, needs: Needs
) -> Gradients:
    """Gradients of a call from those of its results; either may be None."""
    embeds = grad_embeds is not None and problem.table is not None
    grad_hidden = torch.zeros_like(problem.hidden) if needs.hidden else None
    grad_head = _zeros_or_empty(problem, problem.head_weight) if needs.head_weight else None
    grad_table = None
    if needs.table and problem.table is not None:
        grad_table = _zeros_or_empty(problem, problem.table) if embeds else torch.zeros_like(problem.table)
    total = NormGradient(torch.zeros_like(problem.norm.gain), torch.zeros_like(problem.norm.bias))
    held, held_too = problem.array(), problem.array() if embeds and needs.scores else None
    for part in problem.chunks():
        count, first = part.stop - part.start, part.start == 0
        hidden, scores = problem.hidden[part], held[:count]
        _against(hidden, problem.head_weight, out=scores)
        own = None if grad_embeds is None else grad_embeds[part]
        if not needs.scores:
            problem.kernels.weights_(scores, problem.norm, None)
            weights: Tensor | None = scores
        else:
            weights = None if held_too is None else held_too[:count]
            if weights is not None and own is not None and problem.table is not None:
                _against(own, problem.table, out=weights)
            logs = None if grad_log_probs is None else grad_log_probs[part]
            problem.kernels.gradients_(scores, weights, problem.norm, total, problem.columns, logs)
        if grad_table is not None and own is not None and weights is not None:
            _outer(weights, own, out=grad_table, first=first)
        if grad_hidden is not None:
            _onto(scores, problem.head_weight, out=grad_hidden[part])
        if grad_head is not None:
            _outer(scores, hidden, out=grad_head, first=first)
    return Gradients(
        grad_hidden,
        grad_head,
        total.gain.to(problem.gain.dtype) if needs.norm else None,
        total.bias.to(problem.bias.dtype) if needs.norm else None,
        grad_table,
    )


@torch.no_grad()
def vocabulary_mass(hidden: Tensor, head_weight: Tensor, gain: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Sum of P_vocab over all tokens, (V,) in float64: what each row of the vocabulary carries.

    Args:
        hidden: (N, D) after W1 and its norm.
        head_weight: W2, (V, D).
        gain: (V,) of the vocabulary norm.
        bias: (V,) likewise.
        eps: Its epsilon.
    """
    problem = Problem(hidden, head_weight, gain, bias, None, None, eps, BUDGET_BYTES)
    held, mass = problem.array(), torch.zeros(len(gain), dtype=torch.float64, device=hidden.device)
    for part in problem.chunks():
        weights = held[: part.stop - part.start]
        _against(hidden[part], head_weight, out=weights)
        rows.weights_(weights, problem.norm, None)
        mass += weights.sum(dim=0, dtype=problem.norm.gain.dtype)
    return mass


def _zeros_or_empty(problem: Problem, weight: Tensor) -> Tensor:
    """Room for a gradient; the first chunk fills it, so that it needs no zeros unless there is no token."""
    return torch.empty_like(weight) if len(problem.hidden) else torch.zeros_like(weight)


def _slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight in a dtype: all at once if it is its own, else in slices."""
    step = len(weight)
    if weight.dtype != dtype:
        step = max(1, _CAST_BYTES // max(1, weight.shape[1] * dtype.itemsize))
    for start in range(0, len(weight), step):
        part = slice(start, min(start + step, len(weight)))
        yield part, weight[part].to(dtype)


def _against(left: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Left (n, D) · weightᵀ, (n, V)."""
    for part, own in _slices(weight, left.dtype):
        torch.mm(left, own.t(), out=out[:, part])


def _onto(left: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Left (n, V) · weight, (n, D); slices add up in the accumulating dtype."""
    if weight.dtype == left.dtype:
        torch.mm(left, weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=accumulating(left.dtype), device=out.device)
    for part, own in _slices(weight, left.dtype):
        total += left[:, part] @ own
    out.copy_(total)


def _outer(left: Tensor, right: Tensor, *, out: Tensor, first: bool) -> None:
    """Add left (n, V)ᵀ · right (n, D) to `out` (V, D), which the first chunk fills.

    In half precision the sum over chunks is rounded once a chunk, as gradients that accumulate over batches are.
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
