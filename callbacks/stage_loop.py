"""The loop that trains a stage. It makes up for what a process that was stopped or killed has left out."""

from typing import Any, cast

from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop

_DUE = "validation_is_due"


class StageLoop(_FitLoop):
    """Lightning's loop, with every validation and with the end of the stage, wherever an earlier process has ended.

    Lightning's own leaves a validation out that was to follow the step of the checkpoint. Where that step was the last
    one it does nothing at all: the benchmarks and the stage-end folder would be missing for good. Its hooks of the end
    of a fit come too late for them, as the model has left its device.

    CONTRACT: callbacks/stage_transition.py puts it in place; preemption.py leaves, and saves, wherever it is asked to.
    """

    _validation_is_due = False

    @property
    def skip(self) -> bool:
        """Only where there is nothing to train on."""
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Note whether a validation is under way, or follows the step at whose end this is."""
        batches: Any = self.epoch_loop.batch_progress.total
        # Lightning counts a batch as processed before the hooks of its end, and as completed behind them.
        ending = self._data_fetcher is not None and batches.processed > batches.completed
        due = self.trainer.validating or (
            ending and self.epoch_loop._should_check_val_fx(cast(_DataFetcher, self._data_fetcher))
        )
        return {**super().on_save_checkpoint(), _DUE: due}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Take the note up."""
        self._validation_is_due = state_dict.get(_DUE, False)
        super().on_load_checkpoint(state_dict)

    def reset(self) -> None:
        """As Lightning's, which takes the epoch behind a checkpoint of an epoch's last step for that epoch's rest.

        It would then count one epoch too few, and train one too many.
        """
        super().reset()
        epochs: Any = self.epoch_progress.total
        if self.restarted_mid_epoch and epochs.processed == epochs.started:
            self.reset_restart_stage()

    def on_run_start(self) -> None:
        """Run the validation that is due from its first batch, before anything is trained."""
        super().on_run_start()
        if self._validation_is_due:
            self._validation_is_due = False
            validation = self.epoch_loop.val_loop
            validation.restarting = False
            self.trainer.validating = True
            validation.run()
            self.trainer.training = True
