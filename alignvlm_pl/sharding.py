"""Calling parts of a model whose parameters are sharded over ranks (FSDP)."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


def is_sharded(root: nn.Module | None) -> bool:
    """Whether a module's parameters are sharded, so that all ranks must call it equally often."""
    return isinstance(root, FullyShardedDataParallel)


def root_parameters(root: nn.Module | None, *, writeback: bool = False) -> AbstractContextManager[None]:
    """Gather the parameters that belong to the outermost module alone, while one of its parts is called directly.

    The wrapped layers inside gather their own when they run. `generate` calls a part, and would find the embedding and
    the connector in pieces. Nothing is to be done for a module that is not sharded.

    Args:
        root: The outermost module.
        writeback: Whether changes that are made to the parameters are kept. All ranks must make the same.
    """
    if root is None or not is_sharded(root):
        return nullcontext()
    context: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        root, writeback=writeback, recurse=False
    )
    return context
