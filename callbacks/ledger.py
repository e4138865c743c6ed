"""The sample log: the keys and losses of each step, from which `replay` rebuilds any batch."""

import os
from collections import defaultdict
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch

from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.host_copies import HostCopy

from .ledger_file import FOLDER, VERSION, cut, rank_file, short, to_line
from .step import ends_step


class Ledger(pl.Callback):
    """Append a line for each micro batch of each rank to `ledger/rank00000.jsonl` (format: ledger_file.py).

    Lines are flushed, so that they survive a `kill -9`; on a GPU one step later, so that no step waits for the device,
    but always before a checkpoint of their step. A resumed run removes the lines after the step that it resumes from.
    The command line puts this callback first, before those that save a checkpoint.
    """

    def __init__(self) -> None:
        self._stream: IO[str] | None = None
        self._waiting: list[tuple[dict[str, Any], HostCopy]] = []
        self._ready = 0  # lines of `_waiting` of earlier steps, whose losses are on the host
        self._micro = 0
        self._cuda = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        folder, step = Path(trainer.default_root_dir) / FOLDER, trainer.global_step
        folder.mkdir(parents=True, exist_ok=True)
        path = rank_file(folder, trainer.global_rank)
        for file in folder.glob("rank*.jsonl"):  # rank 0 also cuts those of ranks that an earlier start of the run had
            if file == path or (trainer.is_global_zero and int(file.stem[4:]) >= trainer.world_size):
                cut(file, step)
        training = getattr(cast(Any, trainer).datamodule, "training", None)
        head = {
            "ledger": VERSION,
            "after": step,
            "rank": trainer.global_rank,
            "world": trainer.world_size,
            "stage": pl_module.current_stage.name,
            "device": pl_module.device.type,
            "precision": str(trainer.precision),
            "data": {} if training is None else training.identity,
        }
        self._micro, self._cuda = 0, pl_module.device.type == "cuda"
        self._stream = path.open("a", encoding="utf-8")
        self._stream.write(to_line(head))
        self._stream.flush()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a micro batch; at the end of a step, write the lines whose losses are on the host."""
        stepped = ends_step(trainer, batch_idx)
        line = {
            "step": trainer.global_step + (not stepped),
            "micro": self._micro,
            "rank": trainer.global_rank,
            "keys": batch["keys"],
            "positions": batch["positions"],
            "tiles": batch["tiles"],
            "tokens": batch["tokens"],
            "of": batch["sources"],
        }
        if "documents_per_row" in batch:
            line["per_row"] = batch["documents_per_row"]
        losses = outputs["loss_sum"].reshape(1), outputs["document_loss_sums"], outputs["document_supervised"]
        self._waiting.append((line, HostCopy(torch.cat(losses))))
        self._micro = 0 if stepped else self._micro + 1
        if stepped:
            self._write(self._ready if self._cuda else len(self._waiting))
            self._ready = len(self._waiting)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._write(len(self._waiting))
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write the lines whose losses are on the host; a failed CUDA device is not read again."""
        self._write(self._ready if self._cuda else len(self._waiting))
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._write(len(self._waiting))
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write(self, count: int) -> None:
        if self._stream is None or not count:
            return
        for line, values in self._waiting[:count]:
            self._stream.write(to_line(with_losses(line, values.tolist())))
        self._stream.flush()
        del self._waiting[:count]
        self._ready = max(self._ready - count, 0)


def with_losses(line: dict[str, Any], values: list[float]) -> dict[str, Any]:
    """Add the losses to the line of n documents: `values` are a loss sum, n loss sums, n numbers of tokens."""
    documents = len(line["of"])
    total, sums, counts = values[0], values[1 : 1 + documents], values[1 + documents :]
    by_source: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for source, own, count in zip(line["of"], sums, counts, strict=True):
        by_source[source][0] += own
        by_source[source][1] += count
    return {
        **{name: value for name, value in line.items() if name != "of"},
        "supervised": [int(count) for count in counts],
        "losses": [short(own / max(count, 1)) for own, count in zip(sums, counts, strict=True)],
        "loss": short(total / max(sum(counts), 1)),
        "sources": {name: [short(own / max(n, 1)), int(n)] for name, (own, n) in by_source.items()},
    }
