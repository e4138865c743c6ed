"""A callback that writes down what each rank was trained on, for the drills."""

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Recorder(pl.Callback):
    """Append a line a micro batch to `ledger-<rank>.jsonl`: step, place in the epoch, keys, loss in full digits."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "micro": batch_idx % trainer.accumulate_grad_batches,
            "world": trainer.world_size,
            "keys": batch["keys"],
            "loss": float(outputs["loss"]).hex(),
        }
        path = Path(trainer.default_root_dir) / f"ledger-{trainer.global_rank}.jsonl"
        with path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
