"""What happens where a stage begins and ends: hand-over, freeze table, the printed table, the stage-end folder."""

import logging
import platform
from collections import deque
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

import alignvlm_pl
from alignvlm_pl.checkpoint import export, verify_parent
from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.models.whole_weights import FILE_SIZE, whole_weights, write_weights
from alignvlm_pl.module import AlignVLMModule
from alignvlm_pl.part_table import part_table
from alignvlm_pl.sharding import is_sharded
from alignvlm_pl.stages import Stage

log = logging.getLogger(__name__)
EXPORT_FOLDER = "hf"


class StageTransition(pl.Callback):
    """Begin and end one training stage.

    Each stage is a fit of its own with a fresh trainer and strategy, because parameters may not be frozen or unfrozen
    under a wrapped model (DDP would stop averaging them, silently).

    Args:
        stage: The stage to run.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parent: dict[str, Any] | None = None
        self._exported = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Verify the parent and hand the stage to the module, before the model is built."""
        assert isinstance(pl_module, AlignVLMModule)
        if stage != "fit":
            return
        if self.stage.init_from is not None:
            self.parent = verify_parent(
                self.stage.init_from, parent=self.stage.parent, tiling=pl_module.processor.tiling
            )
        pl_module.begin_stage(self.stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print and log the table of parts."""
        assert isinstance(pl_module, AlignVLMModule)
        table = part_table(pl_module.net, self.stage)
        if trainer.is_global_zero:
            log.info("\n%s\n", table)
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("stage", f"```\n{table}\n```")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the stage when its time is over, on all ranks at the same step."""
        assert isinstance(pl_module, AlignVLMModule)
        limit = self.stage.max_minutes
        if limit is None:
            return
        if trainer.strategy.reduce_boolean_decision(pl_module.stage_seconds > 60 * limit, all=False):
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the stage-end folder; an interrupted stage leaves none and is resumed instead."""
        if trainer.interrupted:
            return
        self._export(trainer, pl_module)
        self._exported = True
        trainer.strategy.barrier("stage end")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder of a stage that was killed between its last step and this: then no training starts."""
        if not trainer.interrupted and not self._exported:
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        record = {
            "stage": self.stage.name,
            "parent": {"stage": self.parent["stage"], "weights_sha256": self.parent["weights_sha256"]}
            if self.parent
            else None,
            "steps": trainer.global_step,
            "seconds": round(pl_module.stage_seconds, 1),
            "tiling": pl_module.processor.tiling,
            **({"calibration": pl_module.calibration} if pl_module.calibration else {}),
            "versions": {
                "alignvlm_pl": alignvlm_pl.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "lightning", "transformers")},
            },
        }
        folder = Path(trainer.default_root_dir) / EXPORT_FOLDER
        if is_sharded(pl_module.net):
            _export_together(trainer, pl_module, folder, record)
        elif trainer.is_global_zero:
            save = partial(pl_module.net.save_pretrained, max_shard_size=FILE_SIZE)
            export(pl_module.net, pl_module.processor, folder, record, save=save)
        if trainer.is_global_zero:
            log.info("stage %s: %d steps, weights in %s", self.stage.name, trainer.global_step, folder)


def _export_together(
    trainer: pl.Trainer, module: AlignVLMModule, folder: Path, record: dict[str, Any]
) -> None:
    """Gather the weights on all ranks, one tensor after the other, and write them on the first.

    Raises:
        CheckpointError: They could not be written; on all ranks.
    """
    weights = whole_weights(module.net)
    problem = ""
    try:
        if trainer.is_global_zero:
            save = partial(write_weights, module.net, weights)
            export(module.net, module.processor, folder, record, save=save)
    except CheckpointError as error:
        problem = str(error)
    finally:
        deque(weights, maxlen=0)  # the other ranks gather to the end
    if problem := trainer.strategy.broadcast(problem):
        raise CheckpointError(problem)
