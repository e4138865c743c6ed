"""Parameters that DeepSpeed's ZeRO-3 keeps in pieces: each rank has an equal part of the flattened values.

Such a parameter has no elements but while a module that owns it runs; attributes of DeepSpeed's say what it is.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of a parameter, of a partitioned one that of the whole."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def own_piece(parameter: Any) -> tuple[Tensor, int]:
    """This rank's values of a partitioned parameter (n,), a view without padding, and where they begin in the whole."""
    size = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return parameter.ds_tensor.detach()[: min(size, parameter.ds_numel - start)], start


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have those that are partitioned whole within; all ranks must ask, and nobody may change them.

    They stay whole when a module that owns them has run.
    """
    parts: list[Any] = [parameter for parameter in dict.fromkeys(parameters) if is_partitioned(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        for parameter in parts:
            parameter.ds_active_sub_modules.add("held")
        try:
            yield
        finally:
            for parameter in parts:
                parameter.ds_active_sub_modules.discard("held")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor on every rank; all ranks must ask. Any other tensor as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor
