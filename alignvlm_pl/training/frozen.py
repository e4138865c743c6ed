"""Checksums of what a stage does not train, to show at its end that nothing moved."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import CheckpointError
from ..strategies.zero_parameters import is_partitioned, own_piece
from .stage import PARTS, Stage

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_IN_PIECES = "in pieces"
_CHUNK = 1 << 20  # elements at a time: with four times as many, a CPU takes eight times as long


def frozen_tensors(model: nn.Module, stage: Stage) -> dict[str, Tensor]:
    """Parameters without gradient, and buffers of frozen parts (a norm's running statistics), by name."""
    found: dict[str, Tensor] = {
        name: value for name, value in model.named_parameters() if not value.requires_grad
    }
    for part, rate in stage.learning_rates.items():
        if not rate:
            found |= dict(_saved_buffers(getattr(model, PARTS[part]), PARTS[part]))
    return found


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for the bits of each tensor; all ranks must call it where tensors are sharded.

    Modulo 2^64, the sum over elements i of (bits of element i) x (2 i + 1), i counted over the whole tensor: a change
    of one element always changes it, and shards add up to the same number however many there are. It runs where the
    tensors are.
    """
    names: dict[Any, list[str]] = defaultdict(list)
    sums: dict[Any, list[Tensor]] = defaultdict(list)
    for name, value in tensors.items():
        layout: Any = value.device
        if isinstance(value, DTensor):
            layout = (value.device_mesh, tuple(value.placements))
        elif is_partitioned(value):
            layout = _IN_PIECES
        names[layout].append(name)
        sums[layout].append(_local_sum(value))
    found: dict[str, int] = {}
    for layout, parts in sums.items():
        total = torch.stack(parts)
        if isinstance(layout, tuple):
            mesh, placements = layout
            # Lightning moves a module to the CPU when training is over; the group of its ranks stays on their devices.
            total = total.to(mesh.device_type)
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    dist.all_reduce(total, group=mesh.get_group(dimension))
        elif layout == _IN_PIECES:
            dist.all_reduce(total)
        found |= dict(zip(names[layout], total.tolist(), strict=True))
    return found


def compare_checksums(found: Mapping[str, int], expected: Mapping[str, int], *, stage: str) -> None:
    """Refuse weights that changed although the stage does not train them.

    Raises:
        CheckpointError: Naming the first parameter with both checksums.
    """
    changed = [name for name, value in expected.items() if found.get(name) != value]
    if changed:
        name = changed[0]
        after = f"{found[name] % 2**64:016x}" if name in found else "absent"
        raise CheckpointError(
            f"stage {stage!r} does not train {name}, but it changed: checksum {expected[name] % 2**64:016x} at the "
            f"stage's start, {after} now ({len(changed)} of {len(expected)} frozen tensors differ); no weights are "
            "handed over. Look for a callback that writes to it, then start the stage again from its parent"
        )


def _saved_buffers(part: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for path, module in part.named_modules(prefix=prefix):
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", value


def _local_sum(value: Tensor) -> Tensor:
    """Sum of this rank's elements, int64 ()."""
    shape, offsets = tuple(value.shape), (0,) * value.ndim
    local = value.detach()
    if isinstance(value, DTensor):
        _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        local = value.to_local().detach()
    elif is_partitioned(value):
        # In the order of the flattened whole, in which elements are counted anyway.
        local, start = own_piece(value)
        shape, offsets = (start + len(local),), (start,)
    elif value.ndim == 0:
        local, shape, offsets = local.reshape(1), (1,), (0,)
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    if local.numel() == 0:
        return total
    bits = local.contiguous().view(_BITS[local.element_size()])
    rows = max(1, _CHUNK // max(1, bits[0].numel()))
    for first in range(0, len(bits), rows):
        piece = bits[first : first + rows]
        total += (
            piece.to(torch.int64) * (2 * _positions(piece, shape, (offsets[0] + first, *offsets[1:])) + 1)
        ).sum()
    return total


def _positions(piece: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """Place of each element of a block within the whole tensor, counted row by row."""
    found = torch.zeros((), dtype=torch.int64, device=piece.device)
    stride = 1
    for dimension in reversed(range(piece.ndim)):
        places = torch.arange(piece.shape[dimension], device=piece.device) + offsets[dimension]
        found = found + (places * stride).view(-1, *[1] * (piece.ndim - dimension - 1))
        stride *= shape[dimension]
    return found
