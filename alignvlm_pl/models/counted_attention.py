"""Attention as far as memory goes, for counting on the meta device: what a flash kernel keeps, and nothing computed."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

COUNTED = "counted"
"""Its name for `set_attn_implementation`."""


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    low = value.dtype  # rotary positions in float32 widen the other two, which autocast narrows again
    out: Tensor = _Flash.apply(query.to(low), key.to(low), value)
    return out.transpose(1, 2), None


AttentionInterface.register(COUNTED, _attention)
