"""The definition of Align in plain torch: the oracle of the other back-ends, and the fastest for few scores."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .mixture import Mixture

_HALF = (torch.float16, torch.bfloat16)


def mix_eager(
    hidden: Tensor,
    head_weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    table: Tensor | None,
    *,
    eps: float,
    columns: Tensor | None = None,
) -> Mixture:
    """Equations 1 and 2 as they stand; keeps several (N, V) arrays. Arguments as `ops.align_read`."""
    scores = F.layer_norm(F.linear(hidden, head_weight), gain.shape, gain, bias, eps)
    scores = scores.float() if scores.dtype in _HALF else scores
    log_probs = None
    if columns is not None:
        log_probs = scores[:, columns] - scores.logsumexp(dim=-1, keepdim=True)
    if table is None:
        return Mixture(None, log_probs)
    return Mixture(scores.softmax(dim=-1).to(table.dtype) @ table, log_probs)
