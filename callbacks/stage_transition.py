"""What happens where a stage begins and ends: hand-over, freeze table, the printed table, the stage-end folder."""

import logging
from collections import deque
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.strategies.gather_weights import FILE_SIZE, whole_weights, write_weights
from alignvlm_pl.strategies.sharding import is_sharded
from alignvlm_pl.training.checkpoint_metadata import CONTENTS, check_parent, describe, library_versions
from alignvlm_pl.training.export import export, verify_parent
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.training.part_table import part_table
from alignvlm_pl.training.stage import Stage

from .stage_loop import StageLoop

log = logging.getLogger(__name__)
EXPORT_FOLDER = "hf"


class StageTransition(pl.Callback):
    """Begin and end one training stage.

    Each stage is a fit of its own with a fresh trainer and strategy, because parameters may not be frozen or unfrozen
    under a wrapped model (DDP would stop averaging them, silently).

    Args:
        stage: The stage to run.
        max_shard_size: See `alignvlm_pl.training.export.export`.
    """

    def __init__(self, stage: Stage, *, max_shard_size: str = FILE_SIZE) -> None:
        self.stage = stage
        self.max_shard_size = max_shard_size
        self.parent: dict[str, str] | None = None
        self._samples_seen: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Verify the parent and hand the stage to the module, before the model is built.

        Raises:
            CheckpointError: The parent is another stage, of another model, or damaged; on all ranks.
        """
        assert isinstance(pl_module, AlignVLMModule)
        if stage != "fit":
            return
        trainer.fit_loop.__class__ = StageLoop  # Lightning does not ask which loop to take
        if self.stage.init_from is not None:
            # Rank 0 alone reads and hashes the weights, but all must hear of it, or the others would wait for it.
            verified = trainer.strategy.broadcast(
                self._verify(pl_module, self.stage.init_from) if trainer.is_global_zero else None
            )
            if isinstance(verified, str):
                raise CheckpointError(verified)
            self.parent = verified
        pl_module.begin_stage(self.stage)

    def _verify(self, module: AlignVLMModule, folder: str) -> dict[str, str] | str:
        """Stage and hash of the parent, or what is wrong with it."""
        try:
            record = verify_parent(folder, parent=self.stage.parent, contract=module.contract)
        except CheckpointError as error:
            return str(error)
        except OSError as error:  # told to all ranks, which would wait for this one
            return f"stage.init_from={folder} cannot be read: {error}"
        return {"stage": record["stage"], "weights_sha256": record["weights_sha256"]}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have the checkpoint say what it is."""
        assert isinstance(pl_module, AlignVLMModule)
        data = checkpoint.get(type(trainer.datamodule).__qualname__) or {}  # type: ignore[attr-defined]  # set by Lightning
        self._samples_seen = data.get("samples_seen", self._samples_seen)
        checkpoint[CONTENTS] = describe(
            config=pl_module.net.config,
            contract=pl_module.contract,
            stage=self.stage,
            parent=self.parent,
            samples_seen=dict(self._samples_seen),
        )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the stage started from the weights that `stage.init_from` holds.

        Raises:
            CheckpointError: It did not.
        """
        contents = checkpoint.get(CONTENTS)
        if contents is not None:
            check_parent(contents["parent"], self.parent)
            self._samples_seen = contents["samples_seen"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print and log the table of parts."""
        assert isinstance(pl_module, AlignVLMModule)
        table = part_table(pl_module.net, self.stage)
        if trainer.is_global_zero:
            log.info("\n%s\n", table)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("stage", f"```\n{table}\n```")

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
        # All ranks must ask, and only now: the last checkpoint may be some steps old.
        state = trainer.datamodule.state_dict()  # type: ignore[attr-defined]  # set by Lightning
        self._samples_seen = state.get("samples_seen", self._samples_seen)
        self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        folder = Path(trainer.default_root_dir) / EXPORT_FOLDER
        record = self._record(trainer, pl_module)
        if is_sharded(pl_module.net):
            self._export_together(trainer, pl_module, folder, record)
        elif trainer.is_global_zero:
            export(pl_module.net, pl_module.processor, folder, record, max_shard_size=self.max_shard_size)
        if trainer.is_global_zero:
            log.info("stage %s: %d steps, weights in %s", self.stage.name, trainer.global_step, folder)

    def _export_together(
        self, trainer: pl.Trainer, module: AlignVLMModule, folder: Path, record: dict[str, Any]
    ) -> None:
        """Gather the weights on all ranks, one tensor after the other, and write them on the first.

        Raises:
            CheckpointError: They could not be written; on all ranks.
        """
        weights = whole_weights(module.net, self.max_shard_size, keep=trainer.is_global_zero)
        problem = ""
        try:
            if trainer.is_global_zero:
                save = partial(write_weights, module.net, weights, max_shard_size=self.max_shard_size)
                export(module.net, module.processor, folder, record, save=save)
        except CheckpointError as error:
            problem = str(error)
        finally:
            deque(weights, maxlen=0)  # the other ranks gather to the end
        if problem := trainer.strategy.broadcast(problem):
            raise CheckpointError(problem)

    def _record(self, trainer: pl.Trainer, module: AlignVLMModule) -> dict[str, Any]:
        """Facts for `stage.json`."""
        return {
            "stage": self.stage.name,
            "settings": asdict(self.stage),
            "parent": self.parent,
            "steps": trainer.global_step,
            "seconds": round(module.stage_seconds, 1),
            "samples_seen": self._samples_seen,
            "processor": module.contract,
            **({"calibration": module.calibration} if module.calibration else {}),
            "versions": library_versions(),
        }
