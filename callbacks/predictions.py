"""Answers of `predict`, one jsonl file a benchmark and rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from alignvlm_pl.evaluation.batch_records import bad_records
from alignvlm_pl.utils.atomic_files import write_predictions


class PredictionWriter(BasePredictionWriter):
    """Write `predictions/<benchmark>[-rank<i>].jsonl` with key, question and prediction when `predict` is through."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._records: dict[int, list[dict[str, Any]]] = {}

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the answers of a batch, unless it only evens out the ranks, and why samples could not be read."""
        rows = () if batch["filler"] else zip(batch["keys"], batch["questions"], prediction, strict=True)
        new = [{"key": key, "question": question, "prediction": answer} for key, question, answer in rows]
        self._records.setdefault(dataloader_idx, []).extend([*new, *bad_records(batch)])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files."""
        rank = "" if trainer.world_size == 1 else f"-rank{trainer.global_rank}"
        for index, name in enumerate(cast(Any, trainer).datamodule.benchmark_names):
            path = Path(trainer.default_root_dir) / "predictions" / f"{name}{rank}.jsonl"
            write_predictions(path, self._records.get(index, []))
