"""Losses, gradients and weights that are not finite: named, and never saved, exported or taken over.

A gradient norm is the same on all ranks, so all of them end at the same step. A loss that is not finite gets a gradient
that is not (`poisoned`), whichever rank it is on: looking at the norms is enough.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, TrainingError
from ..utils.collectives import gather
from ..utils.host_copies import HostCopy

_NAMED = 4  # Number of samples that an error names
_SHOWN = 60  # Characters of their keys
_MOST = 4096  # Micro batches that are remembered of a step; more than any step has
Micro = tuple[Sequence[str], Tensor]  # Sample keys of a micro batch, and the loss of each sample


@dataclass(kw_only=True)
class _Step:
    number: int
    parts: list[str]
    norms: HostCopy
    micros: list[Micro]


class FiniteCheck:
    """Check the gradient norms of each optimizer step; on a GPU one step later, so that no step waits for it."""

    def __init__(self) -> None:
        self._micros: deque[Micro] = deque(maxlen=_MOST)  # of the step under way
        self._steps: list[_Step] = []  # not checked yet

    def add_batch(self, keys: Sequence[str], losses: Tensor) -> None:
        self._micros.append((keys, losses))

    def add_step(self, number: int, norms: Mapping[str, Tensor]) -> None:
        copy = HostCopy(torch.stack([*norms.values()]))
        self._steps.append(_Step(number=number, parts=list(norms), norms=copy, micros=[*self._micros]))
        self._micros.clear()

    def check(self, *, newest: bool) -> None:
        """Raise a TrainingError on all ranks if a loss or gradient of the steps is not finite; all ranks must call it.

        With `newest` the newest step is checked, too, which waits for the device: before a save or an evaluation.
        """
        count = len(self._steps) - (0 if newest or not self._steps or self._steps[-1].norms.immediate else 1)
        for step in self._steps[:count]:
            norms = dict(zip(step.parts, step.norms.tolist(), strict=True))
            if not all(map(math.isfinite, norms.values())):
                raise TrainingError(_describe(step, norms))
        del self._steps[:count]


def poisoned(loss: Tensor) -> Tensor:
    """Return a loss as it is; one that is not finite with a gradient of NaN, which reaches all ranks."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def first_invalid(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor with a value that is not finite; of a sharded one this rank's rows count."""
    tensors = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in named}
    tensors = {name: value.detach() for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if not tensors:
        return None
    largest = [torch.linalg.vector_norm(value, math.inf).float() for value in tensors.values()]
    finite = torch.stack(largest).isfinite().tolist()  # the only wait for the device
    return next((name for name, valid in zip(tensors, finite, strict=True) if not valid), None)


def require_finite(named: Iterable[tuple[str, Tensor]], *, source: str) -> None:
    """Raise a CheckpointError, with `source`, on all ranks if a weight is not finite.

    All ranks must call it, each with its own rows of sharded weights.
    """
    if name := next(filter(None, gather(first_invalid(named))), None):
        raise diverged(source, name)


def diverged(source: str, name: str) -> CheckpointError:
    """Return the error about a weight that is not finite."""
    return CheckpointError(
        f"{source}: weight {name} holds nan or inf, so the training that made it has diverged; use an earlier "
        "checkpoint or export"
    )


def _describe(step: _Step, norms: Mapping[str, float]) -> str:
    losses = [pair for keys, values in step.micros for pair in zip(keys, values.tolist(), strict=False)]
    pairs: list[tuple[str, Any]] = [pair for rank in gather(losses) for pair in rank]
    invalid = [key for key, value in pairs if not math.isfinite(value)]
    what = f"the loss of {_listing(invalid)} is not finite"
    if not invalid:
        what = f"the losses are finite, but not the gradient; samples {_listing([key for key, _ in pairs])}"
    parts = ", ".join(f"{part} {norm:.3g}" for part, norm in norms.items())
    return (
        f"step {step.number}: {what}; gradient norm {parts}. This step is not saved, the last checkpoint is from "
        "before; lower the learning rates or stage.gradient_clip_norm, or leave the samples out"
    )


def _listing(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(repr(key[:_SHOWN]) for key in keys[:_NAMED]) + more
