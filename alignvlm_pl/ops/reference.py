"""Align in plain torch: the reference that the other back-ends are tested against, and the fastest for few scores."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class AlignOutput(NamedTuple):
    """Averages (N, D) of the table's rows, and log P_vocab (N, C) in at least float32; None where not requested."""

    embeds: Tensor | None
    log_probs: Tensor | None


def align_reference(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    eps: float,
    columns: Tensor | None = None,
) -> AlignOutput:
    """Equations 1 and 2 of the paper, written out; keeps several (N, V) arrays. Arguments as in `ops.align`."""
    scores = F.layer_norm(F.linear(hidden, head_weight), gain.shape, gain, bias, eps)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    log_probs = None if columns is None else scores[:, columns] - scores.logsumexp(dim=-1, keepdim=True)
    embeds = None if table is None else scores.softmax(dim=-1).to(table.dtype) @ table
    return AlignOutput(embeds, log_probs)
