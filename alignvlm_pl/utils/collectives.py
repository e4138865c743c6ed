"""Collectives over tensors and Python objects."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, which can be pickled, in the order of ranks; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def sum_over_ranks(tensor: Tensor, world_size: int) -> Tensor:
    """Sum a tensor on the device of the process group over all ranks in place, without waiting for the device.

    Every rank must call it; with one rank of the Trainer there may be no process group.
    """
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_ranks(flags: Sequence[bool], *, world_size: int, device: torch.device) -> list[bool]:
    """Return which flags are true on any rank, by one reduction; every rank must call it.

    More ranks than one wait for the device.
    """
    if world_size == 1:
        return [*flags]
    # `torch.full` does not wait for the device, as a copy from the host would.
    own = torch.stack([torch.full((), float(flag), device=device) for flag in flags])
    return [count > 0 for count in sum_over_ranks(own, world_size).tolist()]
