"""Training state as a folder: one file of each rank with the values that it owns, and one with everything else.

Only `torch.load(weights_only=True)` reads them, so a folder from elsewhere cannot run code. Any number of
ranks, and a run that is not sharded, can resume from it.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError
from .meta_init import like, own_rows
from .sharding import is_first_copy

_REST = "rest.ckpt"
_STATE_DICT, _OPTIMIZERS, _RANKS = "state_dict", "optimizer_states", "ranks"
_VALUES, _SHAPE = "values", "shape"


class Pieces:
    """A tensor of `shape`, of which each rank's file has some rows (n, ...), in order of the ranks; n may be 0."""

    def __init__(self, pieces: list[Tensor], shape: Iterable[int]) -> None:
        self.shape = torch.Size(shape)
        self.pieces = [piece.reshape(-1, *self.shape[1:]) for piece in pieces]

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows from `rows.start` to `rows.stop`, of whichever files have them."""
        found, begin = [], 0
        for piece in self.pieces:
            found.append(piece[max(rows.start - begin, 0) : max(rows.stop - begin, 0)])
            begin += len(piece)
        return torch.cat(found)

    def whole(self) -> Tensor:
        return torch.cat(self.pieces)


def rank_state(checkpoint: dict[str, Any], *, rank: int) -> dict[str, Any]:
    """Take the tensors out of Lightning's checkpoint: this rank's pieces; what all have whole is the first rank's."""

    def own(value: Any) -> Any:
        if isinstance(value, DTensor):
            local = value.to_local().detach()
            return {_VALUES: (local if is_first_copy(value) else local[:0]).cpu(), _SHAPE: list(value.shape)}
        if isinstance(value, Tensor):
            return None if rank else value.detach().cpu()
        return value

    return {key: _map_tensors(checkpoint.pop(key), own) for key in (_STATE_DICT, _OPTIMIZERS) if key in checkpoint}


def write_file(content: Any, path: Path) -> None:
    """Save, and wait until it is on the disk; an OSError says why it could not be written."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # Where a write is refused, torch's own archive writer fails as well and hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_rank(folder: Path, own: dict[str, Any], rest: dict[str, Any], *, rank: int, ranks: int) -> None:
    """Write what a rank has to the folder, the first rank the rest too; an OSError as of `write_file`."""
    write_file(own, folder / _file_of(rank, ranks))
    if rank == 0:
        write_file({**rest, _RANKS: ranks}, folder / _REST)


def load_file(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a file of training state, its tensors mapped; a CheckpointError if there is none, or it is damaged."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:150]
        if path.is_file() and not is_zipfile(path):
            why = "empty, cut off or of another program"
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint ({why})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint (it holds a {type(found).__name__})")
    return found


def is_folder(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / _REST).is_file()


def read_rest(path: Path) -> dict[str, Any]:
    """Read a checkpoint, of a folder of shards without weights and optimizer state; errors as of `load_file`."""
    return load_file(path / _REST if is_folder(path) else path)


def read_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint, file or folder, as an unsharded model takes it; errors as of `load_file`."""
    return make_whole(read_folder(path)) if path.is_dir() else load_file(path)


def read_folder(folder: Path) -> dict[str, Any]:
    """Lightning's checkpoint with `Pieces` for what was sharded; files are mapped, and none may be missing."""
    checkpoint = _load_part(folder / _REST)
    ranks = checkpoint.pop(_RANKS)
    parts = [_load_part(folder / _file_of(rank, ranks)) for rank in range(ranks)]
    return {**checkpoint, **_join(parts)}


def make_whole(state: Any) -> Any:
    """The same with tensors in place of `Pieces`, as an unsharded model takes it."""
    return _map_tensors(state, lambda value: value.whole() if isinstance(value, Pieces) else value)


def take_rows(stored: Tensor | Pieces, tensor: Tensor) -> Tensor:
    """What a rank owns of a stored tensor, sharded as `tensor` is."""
    if isinstance(stored, Pieces) and not isinstance(tensor, DTensor):
        stored = stored.whole()
    if isinstance(tensor, DTensor):
        local = stored[own_rows(stored.shape[0], tensor)]
        return like(tensor, local.to(tensor.to_local(), copy=True))
    assert isinstance(stored, Tensor)
    return stored


def _file_of(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.ckpt"


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        if first.keys() == {_VALUES, _SHAPE}:
            return Pieces([part[_VALUES] for part in parts], first[_SHAPE])
        return {key: _join([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [_join(list(entries)) for entries in zip(*parts, strict=True)]
    return first


def _map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_tensors(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(inner, change) for inner in value)
    return change(value)


def _load_part(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path.parent} lacks {path.name}: it is no checkpoint folder, or was copied in part; copy it "
            "again, or remove it and the stage starts again from its beginning"
        )
    try:
        return load_file(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remove {path.parent}, the stage then starts again from its beginning"
        ) from error
