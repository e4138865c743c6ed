"""Collectives over Python objects."""

from typing import Any

import torch.distributed as dist


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
