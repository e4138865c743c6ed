"""Memory in which worker processes hand over tiles: allocated once and used again, batch after batch.

A fresh piece of shared memory for each batch costs a page fault for each of its pages, on both sides, and a connection
that hands over its file descriptor; a slot costs them with its first batch only. A slot is free again when the last
tensor over it is gone, so a consumer may keep a batch as long as it likes: the worker takes another slot meanwhile.
"""

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy

LARGE_BYTES = 2**20
"""Smaller arrays go through the pipe with the rest of a batch, which is cheaper than a slot."""
MAX_SLOTS = 64
_HEADER_BYTES = 64
"""In front of the content; the first byte says whether the slot is taken, the others keep the content aligned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InSlot:
    """An array that lies in a slot, as it travels to the main process.

    Attributes:
        worker: Name of the sender, see `Sender`.
        slot: Number of the slot.
        shape: Of the array.
        dtype: Of the array, as NumPy spells it.
        memory: The slot, with the first array that travels in it.
    """

    worker: str
    slot: int
    shape: tuple[int, ...]
    dtype: str
    memory: Tensor | None


class Sender:
    """The slots of one worker process.

    Attributes:
        worker: A name that no other sender has.
    """

    def __init__(self) -> None:
        self.worker = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._slots: list[Tensor] = []
        self._known: set[int] = set()  # slots that the main process has mapped
        self._taken: dict[int, int] = {}  # address of an array that has not been sent yet -> its slot

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return an array for tiles, not initialised; in a slot if it is large and there is a free one."""
        size = prod(shape) * dtype.itemsize
        slot = self._free_slot(size) if size >= LARGE_BYTES else None
        if slot is None:
            return np.empty(shape, dtype)
        array = _content(self._slots[slot], shape, dtype)
        self._slots[slot][0] = 1
        self._taken[array.ctypes.data] = slot
        return array

    def pack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch whose tensors are arrays or in slots. Slots that are in no tensor of it become free."""
        packed = {
            name: self._pack(value) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        for slot in self._taken.values():
            self._slots[slot][0] = 0
        self._taken.clear()
        return packed

    def _pack(self, tensor: Tensor) -> "np.ndarray | InSlot":
        array = tensor.numpy()
        slot = self._taken.pop(array.ctypes.data, None)
        if slot is None:
            return array
        memory = None if slot in self._known else self._slots[slot]
        self._known.add(slot)
        return InSlot(worker=self.worker, slot=slot, shape=array.shape, dtype=array.dtype.str, memory=memory)

    def _free_slot(self, size: int) -> int | None:
        """Return a slot with room, the smallest that is free; None where the main process keeps too many."""
        free = [number for number, memory in enumerate(self._slots) if not memory[0]]
        fitting = [number for number in free if len(self._slots[number]) >= _HEADER_BYTES + size]
        if fitting:
            return min(fitting, key=lambda number: len(self._slots[number]))
        if len(self._slots) < MAX_SLOTS:
            slot = len(self._slots)
            self._slots.append(_shared(_HEADER_BYTES + size))
            return slot
        if not free:
            return None
        self._slots[free[0]] = _shared(_HEADER_BYTES + size)
        self._known.discard(free[0])
        return free[0]


# Of the main process. Not an object of the loader: torch's thread that pins memory unpacks batches as well.
_received: dict[tuple[str, int], Tensor] = {}


def unpack(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of tensors from what `Sender.pack` made of it; what lies in a slot is not copied."""
    return {name: _tensor(value) for name, value in batch.items()}


def forget(worker: str) -> None:
    """Let go of the slots of a worker that has ended; each is given back with the last tensor over it."""
    for place in list(_received):  # another thread may add to it
        if place[0] == worker:
            del _received[place]


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, InSlot):
        return value
    place = value.worker, value.slot
    if value.memory is not None:
        _received[place] = value.memory
    memory = _received[place]
    array = _content(memory, value.shape, np.dtype(value.dtype))
    # The storage of the tensor, and of all views of it, holds this array: when it goes, nobody reads the slot.
    weakref.finalize(array, _release, memory.numpy(), os.getpid()).atexit = False
    return torch.from_numpy(array)


def _release(memory: np.ndarray, pid: int) -> None:
    """Free a slot, in the process that received it: one that was forked since has the same arrays, and drops them."""
    if os.getpid() == pid:
        memory[0] = 0


def _content(memory: Tensor, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    end = _HEADER_BYTES + prod(shape) * dtype.itemsize
    array: np.ndarray = memory.numpy()[_HEADER_BYTES:end].view(dtype).reshape(shape)
    return array


def _shared(size: int) -> Tensor:
    """Bytes in memory that other processes can map, the first of them 0."""
    if hasattr(os, "memfd_create") and get_sharing_strategy() == "file_descriptor":
        # Needs no room in /dev/shm, which is small in containers.
        with os.fdopen(os.memfd_create("tiles"), "wb") as file:
            os.ftruncate(file.fileno(), size)
            # CONTRACT (torch): maps a duplicate of the descriptor, as the process that receives a tensor does.
            storage = torch.UntypedStorage._new_shared_fd_cpu(file.fileno(), size)  # type: ignore[attr-defined]
    else:
        storage = torch.UntypedStorage._new_shared(size, device="cpu")
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
    memory[0] = 0
    return memory
