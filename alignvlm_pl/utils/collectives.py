"""Collectives over tensors and Python objects."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of ranks; every rank must call it.

    Args:
        value: Anything that can be pickled.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def sum_over_ranks(tensor: Tensor, world_size: int) -> Tensor:
    """Return the sum of a tensor over all ranks, without waiting for the device; every rank must call it.

    Args:
        tensor: On the device of the process group; changed in place.
        world_size: Ranks of the Trainer: with one there may be no process group.
    """
    if world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, *, world_size: int, device: torch.device) -> bool:
    """Whether a flag is true on any rank; as `any_ranks`."""
    return any_ranks([flag], world_size=world_size, device=device)[0]


def any_ranks(flags: Sequence[bool], *, world_size: int, device: torch.device) -> list[bool]:
    """Return which flags are true on any rank, by one reduction; every rank must call it.

    More ranks than one wait for the device.
    """
    if world_size == 1:
        return [*flags]
    # `torch.full` does not wait for the device, as a copy from the host would.
    own = torch.stack([torch.full((), float(flag), device=device) for flag in flags])
    return [count > 0 for count in sum_over_ranks(own, world_size).tolist()]
