"""Values that are copied from the device without a wait, and read once the copy has long been made."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor of any device on the host, begun behind what the device has to do now."""

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        self._copied: Any = None  # CUDA event behind the copy
        if values.device.type == "cuda":
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._values = values

    @property
    def immediate(self) -> bool:
        """Whether the values were on the host from the start, so that reading them never waits."""
        return self._copied is None

    def tolist(self) -> Any:
        """Return the values as Python numbers; waits for the device where the copy is not made yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
