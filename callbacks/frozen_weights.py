"""Frozen weights are bit-identical at the end of a stage, or the stage ends with an error."""

from typing import Any

import lightning.pytorch as pl

from alignvlm_pl.training.frozen import checksums, compare_checksums, frozen_tensors
from alignvlm_pl.training.module import AlignVLMModule


class FrozenWeights(pl.Callback):
    """Compare checksums of all frozen tensors: at the stage's start, where it is resumed, and at its end.

    The checksums of the start travel in the checkpoint. CONTRACT: alignvlm_pl/cli/lightning_cli.py puts this right
    before `StageTransition`, which writes the weights that are handed over: so it sees what all others did to them.
    """

    def __init__(self) -> None:
        self._start: dict[str, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The checksums of the stage's start."""
        return {"checksums": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of the stage's start."""
        self._start = state_dict["checksums"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember a fresh stage's checksums, or compare a resumed one's.

        Raises:
            CheckpointError: The checkpoint's frozen weights are not those that the stage began with.
        """
        if self._start is None:
            self._start = self._now(pl_module)
        else:
            self._compare(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare at the end of the stage, or where it was interrupted.

        Raises:
            CheckpointError: A frozen tensor changed.
        """
        self._compare(pl_module)

    def _compare(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        assert pl_module.stage is not None
        assert self._start is not None
        compare_checksums(self._now(pl_module), self._start, stage=pl_module.stage.name)

    def _now(self, pl_module: pl.LightningModule) -> dict[str, int]:
        assert isinstance(pl_module, AlignVLMModule)
        assert pl_module.stage is not None
        return checksums(frozen_tensors(pl_module.net, pl_module.stage))
