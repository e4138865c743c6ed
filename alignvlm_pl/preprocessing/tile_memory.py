"""Where tiles are written: ordinary memory, or what a worker process shares with the main process."""

from collections.abc import Sequence

import numpy as np


class TileMemory:
    """Ordinary memory."""

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a uint8 array that is not initialised."""
        return np.empty(shape, np.uint8)

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Return uint8 arrays, at least one and equal but for their first axis, one after another.

        Where only one has anything in it, that one.
        """
        filled = [array for array in arrays if len(array)]
        return filled[0] if len(filled) == 1 else np.concatenate(arrays)


_memory = TileMemory()


def tile_memory() -> TileMemory:
    """Where this process writes tiles."""
    return _memory


def use_tile_memory(memory: TileMemory) -> None:
    """Write tiles elsewhere, in this process.

    CONTRACT: in worker processes of datamodules/loading/loader.py it is `slots.Sender`, whose memory serves
    one batch after another: there, tiles are not kept beyond the batch that they are cut for.
    """
    global _memory
    _memory = memory
