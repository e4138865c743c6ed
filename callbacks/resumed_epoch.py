"""Going on inside an epoch with another number of ranks."""

from typing import Any

import lightning.pytorch as pl

from alignvlm_pl.errors import CheckpointError

_COUNTS = ("ready", "started", "processed", "completed")


class ResumedEpoch(pl.Callback):
    """Count the batches of the epoch that is resumed in batches of as many ranks as there are now.

    Lightning keeps how many micro batches each rank had taken. On other ranks the same samples are another number of
    them, and the epoch would end too early or too late.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Change the counts before Lightning restores its loops from them.

        Raises:
            CheckpointError: The data are those of another DataModule, whose place would be lost without a word.
        """
        name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]  # set by Lightning
        states = [
            key for key, value in checkpoint.items() if isinstance(value, dict) and "epoch_samples" in value
        ]
        if states and name not in states:
            raise CheckpointError(
                f"the checkpoint was trained with {states[0]}, data.class_path is {name}: how far the data were read "
                "would be lost; use the same class, or start the stage again from its parent"
            )
        before = len(checkpoint[name]["ranks"]) if states else trainer.world_size
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        for counts in (progress.get("current"), progress.get("total")):
            if counts:
                # Lightning tells from the differences at which moment the checkpoint was written: they must stay.
                shift = counts["processed"] * before // trainer.world_size - counts["processed"]
                counts.update({name: counts[name] + shift for name in _COUNTS})
