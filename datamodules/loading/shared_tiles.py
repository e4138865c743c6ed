"""Memory in which worker processes hand over tiles: allocated once and used again, batch after batch.

A fresh piece of shared memory for each batch costs a page fault for each of its pages, on both sides, and a connection
that hands over its file descriptor; a slot costs them with its first batch only. A slot is free again when the last
tensor over it is gone, so a consumer may keep a batch as long as it likes: the worker takes another slot meanwhile.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy

from alignvlm_pl.preprocessing.tile_memory import TileMemory

SMALL_BYTES = 2**20
"""Less than that goes through the pipe with the rest of a batch, which is cheaper than a slot."""
SLOT_BYTES = 2**28
"""Room of a slot. Only address space: what no batch has been written to is not there."""
MAX_SLOTS = 64
_HEADER_BYTES = 64
"""In front of the content; the first byte says whether the slot is taken, the others keep the content aligned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InSlot:
    """A uint8 array that lies in a slot, as it travels to the main process.

    Attributes:
        worker: Name of the sender, see `Sender`.
        slot: Number of the slot.
        start: Its place in the content of the slot.
        shape: Of the array.
        memory: The slot, with the first array that travels in it.
    """

    worker: str
    slot: int
    start: int
    shape: tuple[int, ...]
    memory: Tensor | None


class Sender(TileMemory):
    """The slots of one worker process.

    Tiles are cut one after another into the same slot, so that those of a batch are joined without being copied.

    Attributes:
        worker: A name that no other sender has.
    """

    def __init__(self) -> None:
        self.worker = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._slots: list[Tensor] = []
        self._known: set[int] = set()  # slots that the main process has mapped
        self._room = SLOT_BYTES  # of a new slot
        self._open: int | None = None  # the slot that is being written
        self._begun: set[int] = set()  # slots that the next batch has been written to
        self._content = np.empty(0, np.uint8)  # of the open slot
        self._used = 0  # bytes of it

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array that is not initialised, behind the last one where there is room."""
        size = prod(shape)
        if self._open is None:
            self._begin_slot(size)
        start = self._used
        if start + size > len(self._content):
            return super().empty(shape)
        self._used += size
        return self._content[start : start + size].reshape(shape)

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return arrays one after another; they are copied only where they do not lie like this."""
        filled = [array for array in arrays if array.size]
        shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
        start = self._start(filled[0]) if filled else None
        if start is not None and all(
            one.ctypes.data + one.size == other.ctypes.data for one, other in pairwise(filled)
        ):
            return self._content[start : start + prod(shape)].reshape(shape)
        if self._used + prod(shape) > len(self._content):
            self._begin_slot(prod(shape))
        return np.concatenate(arrays, out=self.empty(shape))

    def pack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch whose tensors are arrays or in slots. Nothing else of what was written is kept."""
        packed = {
            name: self._pack(value) if isinstance(value, Tensor) else value for name, value in batch.items()
        }
        self.discard()
        return packed

    def discard(self) -> None:
        """Let what was written since the last batch be written over, if none of it was sent."""
        if self._open is not None and self._slots[self._open][0]:
            self._open = None
        self._begun = set() if self._open is None else {self._open}
        self._used = 0

    def _pack(self, tensor: Tensor) -> "np.ndarray | InSlot":
        array = tensor.numpy()
        start = self._start(array)
        if start is None:
            return array
        slot = self._open
        assert slot is not None, "it has the array"
        if array.size < SMALL_BYTES or self._slots[slot][0]:  # a slot carries one array
            return array.copy()  # it is written into the pipe later on, when the slot holds other tiles
        self._slots[slot][0] = 1
        memory = None if slot in self._known else self._slots[slot]
        self._known.add(slot)
        return InSlot(worker=self.worker, slot=slot, start=start, shape=array.shape, memory=memory)

    def _start(self, array: np.ndarray) -> int | None:
        """Place of an array in the open slot; None where it lies elsewhere."""
        start = array.ctypes.data - self._content.ctypes.data
        return start if 0 <= start < self._used else None

    def _begin_slot(self, size: int) -> None:
        """Go on with a slot that is free and has room for so many bytes; with none where too many are taken."""
        self._room = max(self._room, size)
        self._open = self._free_slot(size)
        memory = None
        if self._open is not None:
            self._begun.add(self._open)
            memory = self._slots[self._open].numpy()
        self._content = np.empty(0, np.uint8) if memory is None else memory[_HEADER_BYTES:]
        self._used = 0

    def _free_slot(self, size: int) -> int | None:
        free = [number for number, memory in enumerate(self._slots) if not memory[0]]
        for number in free:
            # None of this batch: what lies there has still to be joined.
            if number not in self._begun and len(self._slots[number]) >= _HEADER_BYTES + size:
                return number
        if len(self._slots) < MAX_SLOTS:
            self._slots.append(_shared(_HEADER_BYTES + self._room))
            return len(self._slots) - 1
        if not free:
            return None
        self._slots[free[0]] = _shared(_HEADER_BYTES + self._room)  # arrays in the former memory keep it
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
    start = _HEADER_BYTES + value.start
    array: np.ndarray = memory.numpy()[start : start + prod(value.shape)].reshape(value.shape)
    # The storage of the tensor, and of all views of it, holds this array: when it goes, nobody reads the slot.
    weakref.finalize(array, _release, memory.numpy(), os.getpid()).atexit = False
    return torch.from_numpy(array)


def _release(memory: np.ndarray, pid: int) -> None:
    """Free a slot, in the process that received it: one that was forked since has the same arrays, and drops them."""
    if os.getpid() == pid:
        memory[0] = 0


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
