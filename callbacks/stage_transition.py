"""Begin and end of a training stage: verify its parent, count its steps, print the table of parts."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.training.checkpoint_metadata import CONTENTS, build_metadata, check_data, check_parent
from alignvlm_pl.training.export import verify_parent
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.training.part_table import part_table
from alignvlm_pl.training.stage import Stage, steps_of_epochs
from alignvlm_pl.utils.atomic_files import write_atomically
from alignvlm_pl.utils.collectives import any_ranks

from .step import is_trial, on_one_rank

log = logging.getLogger(__name__)
EARLY_END = "ended_early.json"  # File of the run folder with the step at which a stage ended before `max_steps`


class StageTransition(pl.Callback):
    """Begin one training stage, and end it after `max_minutes`.

    Each stage is a `fit` with a new trainer and strategy: DDP would not average parameters that are unfrozen later.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parent: dict[str, str] | None = None
        self._samples_seen: dict[str, int] = {}
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Verify the parent, hand the stage to the module before the model is built, and count the stage in steps."""
        assert isinstance(pl_module, AlignVLMModule)
        if stage != "fit":
            return
        if (folder := self.stage.init_from) is not None:
            self.parent = on_one_rank(trainer, lambda: self._verify(pl_module, folder))
        pl_module.begin_stage(self.stage)
        self._count_steps(trainer)

    def _count_steps(self, trainer: pl.Trainer) -> None:
        """Turn epochs into steps, which are the same on any number of ranks."""
        per_epoch = getattr(trainer.datamodule, "steps_per_epoch", None)  # type: ignore[attr-defined]  # set by Lightning
        epochs = trainer.max_epochs
        if is_trial(trainer) or trainer.max_steps != -1 or per_epoch is None or not epochs or epochs < 0:
            return
        trainer.fit_loop.epoch_loop.max_steps = steps_of_epochs(
            epochs,
            micro_batches=per_epoch(),
            accumulated=trainer.accumulate_grad_batches,
            limit=trainer.limit_train_batches,
        )
        trainer.fit_loop.max_epochs = -1

    def _verify(self, module: AlignVLMModule, folder: str) -> dict[str, str]:
        try:
            record = verify_parent(folder, parent=self.stage.parent, contract=module.contract)
        except OSError as error:
            raise CheckpointError(f"stage.init_from={folder} cannot be read: {error}") from error
        return {"stage": record["stage"], "weights_sha256": record["weights_sha256"]}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        data = checkpoint.get(type(trainer.datamodule).__qualname__) or {}  # type: ignore[attr-defined]  # set by Lightning
        self._samples_seen = data.get("samples_seen", self._samples_seen)
        checkpoint[CONTENTS] = build_metadata(
            config=pl_module.net.config,
            contract=pl_module.contract,
            stage=self.stage,
            parent=self.parent,
            samples_seen=dict(self._samples_seen),
        )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check that data and parent are those of the stage, and end a stage again that ended early."""
        name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]  # set by Lightning
        check_data(checkpoint, name)
        if name in checkpoint:
            _convert_micro_batches(trainer.world_size, checkpoint, before=len(checkpoint[name].get("ranks", ())))
        contents = checkpoint.get(CONTENTS)
        if contents is not None:
            check_parent(contents["parent"], self.parent)
            self._samples_seen = contents["samples_seen"]
        ended = on_one_rank(trainer, lambda: _recorded_end(trainer))
        if ended is not None and ended == checkpoint["global_step"]:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info("stage %s ended early, at step %d", self.stage.name, ended)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        if not trainer.is_global_zero:
            return
        table = part_table(pl_module.net, self.stage)
        log.info("\n%s\n", table)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("stage", f"```\n{table}\n```")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if (path := trainer.ckpt_path) is not None and trainer.is_global_zero:
            last = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
            log.info("stage %s: resumed from %s, after step %d%s", self.stage.name, path, self._step, last)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        limit = self.stage.max_minutes
        if limit is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        over, device = pl_module.stage_seconds > 60 * limit, trainer.strategy.root_device
        if any_ranks([over], world_size=trainer.world_size, device=device)[0]:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record an early end, so that a run that is killed before its export does not train on."""
        early = trainer.should_stop and trainer.global_step != trainer.max_steps
        if early and trainer.is_global_zero and not is_trial(trainer):
            write_atomically(_note(trainer), json.dumps({"step": trainer.global_step}) + "\n")


def _convert_micro_batches(world_size: int, checkpoint: dict[str, Any], *, before: int) -> None:
    """Convert the micro batches per rank in the loops of a checkpoint, which begin a step, to other ranks."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] if before else {}
    for counts in progress.get("current"), progress.get("total"):
        if counts and before != world_size:
            # The differences between the counts stay: they depend on the hook in which the checkpoint was written.
            shift = counts["processed"] * before // world_size - counts["processed"]
            counts.update({name: count + shift for name, count in counts.items()})


def _note(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / EARLY_END


def _recorded_end(trainer: pl.Trainer) -> int | None:
    note = _note(trainer)
    return int(json.loads(note.read_text())["step"]) if note.is_file() else None
