"""Vocabulary norm and softmax over rows of scores, forward and backward, in plain torch.

Both run in place on blocks of rows that fit in the processor's cache, so that an (n, V) array is read and written once
per pass. They compute in float32 or float64, whatever the dtype of the arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES, _CPU_BLOCK_BYTES = 64 << 20, 2 << 20
"""Bytes of a block: a CPU cache holds at least 2 MiB; accelerators prefer few, large launches."""


@dataclass(frozen=True)
class VocabularyNorm:
    """Gain (V,), bias (V,) and epsilon of the vocabulary norm, in the accumulation dtype."""

    gain: Tensor
    bias: Tensor
    eps: float


@dataclass
class NormGradients:
    """Gradients of the norm's gain and bias summed over tokens, each (V,) in the accumulation dtype."""

    gain: Tensor
    bias: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_softmax_(scores: Tensor, norm: VocabularyNorm, columns: Tensor | None) -> Tensor | None:
    """Replace scores (n, V) by P_vocab = softmax(norm(scores)), in place; return log P_vocab (n, C) of `columns`."""
    log_probs = None if columns is None else norm.gain.new_empty((len(scores), len(columns)))
    for part in _blocks(scores):
        values = _standardise(scores[part].to(norm.gain.dtype), norm)[0]
        if log_probs is not None and columns is not None:
            log_probs[part] = values[:, columns] - values.logsumexp(dim=-1, keepdim=True)
        scores[part] = torch.softmax(values, dim=-1)
    return log_probs


def norm_softmax_backward_(
    scores: Tensor,
    grad_weights: Tensor | None,
    norm: VocabularyNorm,
    total: NormGradients,
    columns: Tensor | None,
    grad_log_probs: Tensor | None,
) -> None:
    """Backward of `norm_softmax_`, in place: scores become their gradient, the weights' gradient becomes the weights.

    With z the standardised scores (standard deviation 1 / r), y = gain · z + bias and p = softmax(y):

        dy = p · (dp − Σ p · dp)   (plus g at the read columns and − p · Σ g, for the gradient g of log p)
        dscores = r · (dz − mean(dz) − z · mean(dz · z)),   dz = gain · dy

    `scores` (n, V) are overwritten with dscores, `grad_weights` (n, V) dp with p (None if only log-probabilities have a
    gradient); the gradients of gain and bias are added to `total`. Of the rows of the vocabulary `columns` (C,) that
    were read out, `grad_log_probs` (n, C) is the gradient.
    """
    wide = norm.gain.dtype
    for part in _blocks(scores):
        raw = scores[part].to(wide)
        values, mean, deviation = _standardise(raw, norm)
        weights = torch.softmax(values, dim=-1)
        if grad_weights is None:
            grad = torch.zeros_like(weights)
        else:
            # Autograd's own kernel, which has no public name; written out, it rounds differently and takes more passes.
            grad = torch._softmax_backward_data(grad_weights[part].to(wide), weights, -1, wide)
            grad_weights[part] = weights
        if grad_log_probs is not None and columns is not None:
            grad_read = grad_log_probs[part]
            grad.addcmul_(weights, grad_read.sum(dim=-1, keepdim=True), value=-1).index_add_(1, columns, grad_read)
        grad, gain, bias = torch.ops.aten.native_layer_norm_backward(
            grad, raw, norm.gain.shape, mean, deviation, norm.gain, norm.bias, [True, True, True]
        )
        scores[part] = grad
        total.gain += gain
        total.bias += bias


def slices(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at least one and at most `size` of `count` rows."""
    for start in range(0, count, max(1, size)):
        yield slice(start, min(start + max(1, size), count))


def _standardise(raw: Tensor, norm: VocabularyNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Return gain · z + bias (n, V), and the mean and the reciprocal standard deviation of every row."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(raw, norm.gain.shape, norm.gain, norm.bias, norm.eps)
    return found


def _blocks(scores: Tensor) -> Iterator[slice]:
    size = _CPU_BLOCK_BYTES if scores.device.type == "cpu" else _BLOCK_BYTES
    return slices(len(scores), size // (4 * scores.shape[1]))
