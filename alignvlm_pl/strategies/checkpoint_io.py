"""How a checkpoint gets onto the disk: written beside its place, then renamed."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..errors import CheckpointError
from ..utils.atomic_files import atomic_path
from .sharded_checkpoint import load_file, read_whole, write_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it: a full disk or a kill leaves the earlier one as it was.

    Lightning writes to the system's temporary folder instead, from where a move to another disk is a copy. Sharded
    strategies write folders (alignvlm_pl/strategies/fsdp.py); unsharded runs read them here.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as partial:
            write_file(checkpoint, partial)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file, or the folder of a sharded strategy with its tensors joined; local files are mapped on the CPU.

        Raises a CheckpointError if it is damaged, or reading it could run code.
        """
        if Path(path).is_dir():
            return read_whole(Path(path))
        try:
            if Path(path).is_file():
                return load_file(Path(path), weights_only=weights_only is not False)
            return super().load_checkpoint(path, map_location, weights_only)
        except (UnpicklingError, CheckpointError) as error:
            if not isinstance(error.__cause__ or error, UnpicklingError):
                raise
            raise CheckpointError(
                f"checkpoint {path} holds more than tensors and plain types, so reading it could run code; if you "
                "trust where it comes from, set --weights_only=false"
            ) from error
