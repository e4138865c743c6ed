"""`norm_softmax` in Triton for CUDA: norm and online softmax of a row fused into one kernel.

Forward reads a row three times and writes it once; backward reads scores four times and the weights' gradient three
times, and writes both once. Sums are kept per lane and reduced at the end, so that no loop waits for a reduction. Loads
are 128 bits wide where 16 divides the number of columns. Matrix products are left to cuBLAS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm_softmax import NormGradients, VocabularyNorm, accumulation_dtype

_ROW_BLOCK, _ROW_WARPS = 4096, 8
_COLUMN_BLOCK, _COLUMN_WARPS = 512, 4
_ROWS_PER_GROUP = 128


def norm_softmax_(scores: Tensor, norm: VocabularyNorm, columns: Tensor | None) -> Tensor | None:
    """As `norm_softmax.norm_softmax_`."""
    read = None if columns is None else scores[:, columns].to(norm.gain.dtype)
    statistics = _row_statistics(scores)
    _norm_softmax_kernel[(len(scores),)](
        scores, statistics, norm.gain, norm.bias, len(scores), scores.shape[1], norm.eps,
        ACC=_accumulation(norm), BLOCK=_block(scores, _ROW_BLOCK), num_warps=_ROW_WARPS,
    )  # fmt: skip
    if columns is None or read is None:
        return None
    mean, deviation, log_sum = (row[:, None] for row in statistics[:3])
    return norm.gain[columns] * (read - mean) * deviation + norm.bias[columns] - log_sum


def norm_softmax_backward_(
    scores: Tensor,
    grad_weights: Tensor | None,
    norm: VocabularyNorm,
    total: NormGradients,
    columns: Tensor | None,
    grad_log_probs: Tensor | None,
) -> None:
    """As `norm_softmax.norm_softmax_backward_`."""
    count, size = scores.shape
    read = None if grad_log_probs is None else scores[:, columns].to(norm.gain.dtype)
    shift = torch.zeros_like(norm.gain[:1]).expand(count) if grad_log_probs is None else grad_log_probs.sum(1)
    shift = shift.contiguous()
    statistics = _row_statistics(scores)
    given = grad_weights is not None
    upstream = scores if grad_weights is None else grad_weights
    _statistics_kernel[(count,)](
        scores, upstream, statistics, shift, norm.gain, norm.bias, count, size, norm.eps,
        GIVEN=given, ACC=_accumulation(norm), BLOCK=_block(scores, _ROW_BLOCK), num_warps=_ROW_WARPS,
    )  # fmt: skip
    if columns is not None and grad_log_probs is not None and read is not None:
        unit = (read - statistics[0][:, None]) * statistics[1][:, None]
        scaled = grad_log_probs * norm.gain[columns]
        statistics[4] += scaled.sum(1) / size
        statistics[5] += (scaled * unit).sum(1) / size
        total.gain.index_add_(0, columns, (grad_log_probs * unit).sum(0))
        total.bias.index_add_(0, columns, grad_log_probs.sum(0))
    groups = triton.cdiv(count, _ROWS_PER_GROUP)
    sums = norm.gain.new_empty((2, groups, size))
    block = _block(scores, _COLUMN_BLOCK)
    _backward_kernel[(triton.cdiv(size, block), groups)](
        scores, upstream, statistics, shift, norm.gain, norm.bias, sums, count, size,
        ROWS=_ROWS_PER_GROUP, GIVEN=given, ACC=_accumulation(norm), BLOCK=block, num_warps=_COLUMN_WARPS,
    )  # fmt: skip
    if columns is not None and grad_log_probs is not None:
        extra = grad_log_probs * norm.gain[columns] * statistics[1][:, None]
        scores.index_add_(1, columns, extra.to(scores.dtype))
    total.gain += sums[0].sum(0)
    total.bias += sums[1].sum(0)


def _row_statistics(scores: Tensor) -> Tensor:
    """Allocate six numbers per row: mean, 1 / deviation, log-sum-exp, Σ p · dp, mean(dz), mean(dz · z)."""
    return torch.zeros((6, len(scores)), dtype=accumulation_dtype(scores.dtype), device=scores.device)


def _accumulation(norm: VocabularyNorm) -> "tl.dtype":
    return tl.float64 if norm.gain.dtype == torch.float64 else tl.float32


def _block(scores: Tensor, largest: int) -> int:
    return min(largest, int(triton.next_power_of_2(scores.shape[1])))


@triton.jit
def _norm_of_row(base, size, eps, ACC: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and 1 / deviation of a row, in one pass (Welford, lane by lane): exact for a mean far from zero."""
    lanes = tl.arange(0, BLOCK)
    means = tl.zeros((BLOCK,), ACC)
    squares = tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        value = tl.load(base + start + lanes, mask=inside, other=0.0).to(ACC)
        apart = tl.where(inside, value - means, 0.0)
        means += apart * (1.0 / tl.cast(start // BLOCK + 1, ACC))
        squares += apart * (value - means)
    seen = tl.cast(size // BLOCK + tl.where(lanes < size % BLOCK, 1, 0), ACC)
    mean = tl.sum(means * seen, 0) / size
    apart = means - mean
    return mean, 1.0 / tl.sqrt(tl.sum(squares + seen * apart * apart, 0) / size + eps)


@triton.jit
def _softmax_of_row(  # type: ignore[no-untyped-def]
    base, upstream, gain, bias, mean, deviation, size, GIVEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Log-sum-exp of a normalised row, and if GIVEN the mean of `upstream` under its softmax; online, in one pass."""
    lanes = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), -1e30, ACC)
    sums = tl.zeros((BLOCK,), ACC)
    weighted = tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        unit = (tl.load(base + start + lanes, mask=inside, other=0.0).to(ACC) - mean) * deviation
        value = unit * tl.load(gain + start + lanes, mask=inside, other=0.0)
        value = tl.where(inside, value + tl.load(bias + start + lanes, mask=inside, other=0.0), -1e30)
        higher = tl.maximum(peaks, value)
        kept = tl.exp(peaks - higher)
        weight = tl.where(inside, tl.exp(value - higher), 0.0)
        sums = sums * kept + weight
        if GIVEN:
            grad = tl.load(upstream + start + lanes, mask=inside, other=0.0).to(ACC)
            weighted = weighted * kept + weight * grad
        peaks = higher
    peak = tl.max(peaks, 0)
    scale = tl.exp(peaks - peak)
    total = tl.sum(sums * scale, 0)
    return peak + tl.log(total), tl.sum(weighted * scale, 0) / total


@triton.jit
def _norm_softmax_kernel(  # type: ignore[no-untyped-def]
    scores, statistics, gain, bias, count, size, eps, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * size
    mean, deviation = _norm_of_row(base, size, eps, ACC, BLOCK)
    log_sum, _ = _softmax_of_row(base, base, gain, bias, mean, deviation, size, False, ACC, BLOCK)
    tl.store(statistics + row, mean)
    tl.store(statistics + count + row, deviation)
    tl.store(statistics + 2 * count + row, log_sum)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        unit = (tl.load(base + start + lanes, mask=inside, other=0.0).to(ACC) - mean) * deviation
        value = unit * tl.load(gain + start + lanes, mask=inside, other=0.0)
        value += tl.load(bias + start + lanes, mask=inside, other=0.0)
        tl.store(base + start + lanes, tl.exp(value - log_sum).to(scores.dtype.element_ty), mask=inside)


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    scores, upstream, statistics, shift, gain, bias, count, size, eps,
    GIVEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = scores + row * size
    mean, deviation = _norm_of_row(base, size, eps, ACC, BLOCK)
    given = upstream + row * size
    log_sum, inner = _softmax_of_row(base, given, gain, bias, mean, deviation, size, GIVEN, ACC, BLOCK)
    lanes = tl.arange(0, BLOCK)
    outer = tl.load(shift + row)
    first = tl.zeros((BLOCK,), ACC)
    second = tl.zeros((BLOCK,), ACC)
    for start in range(0, size, BLOCK):
        inside = start + lanes < size
        unit = (tl.load(base + start + lanes, mask=inside, other=0.0).to(ACC) - mean) * deviation
        scale = tl.load(gain + start + lanes, mask=inside, other=0.0)
        value = unit * scale + tl.load(bias + start + lanes, mask=inside, other=0.0)
        grad = tl.zeros((BLOCK,), ACC)
        if GIVEN:
            grad += tl.load(given + start + lanes, mask=inside, other=0.0).to(ACC)
        inward = tl.where(inside, tl.exp(value - log_sum), 0.0) * (grad - inner - outer) * scale
        first += inward
        second += inward * unit
    tl.store(statistics + row, mean)
    tl.store(statistics + count + row, deviation)
    tl.store(statistics + 2 * count + row, log_sum)
    tl.store(statistics + 3 * count + row, inner)
    tl.store(statistics + 4 * count + row, tl.sum(first, 0) / size)
    tl.store(statistics + 5 * count + row, tl.sum(second, 0) / size)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    scores, upstream, statistics, shift, gain, bias, sums, count, size,
    ROWS: tl.constexpr, GIVEN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For a block of columns and a group of rows: gradient of the scores, weights, and sums for gain and bias."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    group = tl.program_id(1)
    scale = tl.load(gain + columns, mask=inside, other=0.0)
    offset = tl.load(bias + columns, mask=inside, other=0.0)
    gain_sum = tl.zeros((BLOCK,), ACC)
    bias_sum = tl.zeros((BLOCK,), ACC)
    for row in range(group * ROWS, tl.minimum(count, (group + 1) * ROWS)):
        offsets = tl.cast(row, tl.int64) * size + columns
        mean, deviation = tl.load(statistics + row), tl.load(statistics + count + row)
        log_sum, inner = tl.load(statistics + 2 * count + row), tl.load(statistics + 3 * count + row)
        unit = (tl.load(scores + offsets, mask=inside, other=0.0).to(ACC) - mean) * deviation
        weight = tl.where(inside, tl.exp(unit * scale + offset - log_sum), 0.0)
        grad = tl.zeros((BLOCK,), ACC)
        if GIVEN:
            grad += tl.load(upstream + offsets, mask=inside, other=0.0).to(ACC)
        inward = weight * (grad - inner - tl.load(shift + row))
        gain_sum += inward * unit
        bias_sum += inward
        first, second = tl.load(statistics + 4 * count + row), tl.load(statistics + 5 * count + row)
        result = deviation * (inward * scale - first - unit * second)
        tl.store(scores + offsets, result.to(scores.dtype.element_ty), mask=inside)
        if GIVEN:
            tl.store(upstream + offsets, weight.to(upstream.dtype.element_ty), mask=inside)
    tl.store(sums + group.to(tl.int64) * size + columns, gain_sum, mask=inside)
    tl.store(sums + (tl.num_programs(1) + group).to(tl.int64) * size + columns, bias_sum, mask=inside)
