"""What happens to the scores between the matrix products, a few rows at a time: norm and softmax, both ways.

A block of rows stays in the processor's cache from the norm to the softmax and back, so that (tokens, V) arrays are
read and written once a pass. Everything works in place and in at least float32, whatever the arrays' own dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_BYTES_ELSEWHERE = 64 << 20
"""A processor's cache holds 2 MiB and more; an accelerator wants few, large launches."""


@dataclass(frozen=True)
class Norm:
    """The vocabulary norm.

    Args:
        gain: (V,) in the accumulating dtype.
        bias: (V,) likewise.
        eps: Its epsilon.
    """

    gain: Tensor
    bias: Tensor
    eps: float


@dataclass
class NormGradient:
    """Sums over tokens of the gradients of the norm's parameters, each (V,) in the accumulating dtype."""

    gain: Tensor
    bias: Tensor


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights_(scores: Tensor, norm: Norm, columns: Tensor | None) -> Tensor | None:
    """Turn scores (n, V) into weights, in place.

    Returns:
        (n, len(columns)) log P_vocab, or None where no columns are asked for.
    """
    log_probs = None
    if columns is not None:
        log_probs = scores.new_empty((len(scores), len(columns)), dtype=norm.gain.dtype)
    for part in _blocks(scores):
        values = _normalised(scores[part].to(norm.gain.dtype), norm)[0]
        if log_probs is not None and columns is not None:
            log_probs[part] = values[:, columns] - values.logsumexp(dim=-1, keepdim=True)
        scores[part] = torch.softmax(values, dim=-1)
    return log_probs


def gradients_(
    scores: Tensor,
    grad_weights: Tensor | None,
    norm: Norm,
    total: NormGradient,
    columns: Tensor | None,
    grad_log_probs: Tensor | None,
) -> None:
    """Turn scores (n, V) into their gradient and the gradient of the weights (n, V) into the weights, in place.

    With z the scores without mean and of unit variance (deviation 1/r), y = gain · z + bias and p = softmax(y):

        dy = p · (dp − Σ p · dp)   (and for log p of columns: + g at the columns, − p · Σ g)
        dscores = r · (dz − mean(dz) − z · mean(dz · z)),   dz = gain · dy

    Args:
        scores: (n, V), becomes dscores.
        grad_weights: (n, V) dp, becomes p; None if only log-probabilities have a gradient.
        norm: The vocabulary norm.
        total: The norm's gradient is added to it.
        columns: Ids of the columns that have been read out.
        grad_log_probs: (n, len(columns)) their gradient, or None.
    """
    wide = norm.gain.dtype
    for part in _blocks(scores):
        raw = scores[part].to(wide)
        values, mean, deviation = _normalised(raw, norm)
        weights = torch.softmax(values, dim=-1)
        if grad_weights is None:
            grad = torch.zeros_like(weights)
        else:
            grad = torch._softmax_backward_data(grad_weights[part].to(wide), weights, -1, wide)
            grad_weights[part] = weights
        if grad_log_probs is not None and columns is not None:
            own = grad_log_probs[part]
            grad.addcmul_(weights, own.sum(dim=-1, keepdim=True), value=-1).index_add_(1, columns, own)
        grad, gain, bias = torch.ops.aten.native_layer_norm_backward(
            grad, raw, norm.gain.shape, mean, deviation, norm.gain, norm.bias, [True, True, True]
        )
        scores[part] = grad
        total.gain += gain
        total.bias += bias


def _normalised(raw: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Gain · z + bias, the mean, and one over the deviation, of every row."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        raw, norm.gain.shape, norm.gain, norm.bias, norm.eps
    )
    return found


def _blocks(scores: Tensor) -> Iterator[slice]:
    size = _BLOCK_BYTES.get(scores.device.type, _BLOCK_BYTES_ELSEWHERE)
    step = max(1, size // (4 * scores.shape[1]))
    for start in range(0, len(scores), step):
        yield slice(start, start + step)
