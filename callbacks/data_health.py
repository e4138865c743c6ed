"""Health of the training data: the loss of each source, padding, truncated and skipped samples."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from alignvlm_pl.utils.collectives import gather

from .outputs import log_metrics
from .step import ends_logged_step


class DataHealth(Callback):
    """Log at every `trainer.log_every_n_steps`, over all ranks and all batches since the last time.

    `train/loss/<source>`: mean loss of a supervised token (objective `read`: of a character) of that source.
    `data/padding_share`: share of the positions that are padding. `data/truncated_share`: share of the documents whose
    text was truncated, and `data/truncated` their number. `data/real_tokens`: number of positions that are no padding.
    `data/wait_share`: share of the time that training waited for batches. Since the run began: `data/skipped_<reason>`
    and `data/skipped_<reason>/<source>`, numbers of skipped samples.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}  # the metrics logged last, shown by the progress bar
        self._sums: dict[str, float] = defaultdict(float)
        self._sources: list[str] = []
        # Tensors (losses, tokens) are kept until they are logged: reading them would wait for the device at each step.
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._before = (time.monotonic(), 0.0)  # at the last logging: the time, and the seconds waited so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = (time.monotonic(), getattr(cast(Any, trainer).datamodule, "wait_seconds", 0.0))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sources += batch["sources"]
        losses = torch.stack([outputs["document_loss_sums"], outputs["document_supervised"]])
        self._waiting.append((losses, batch["attention_mask"].sum()))
        self._sums["positions"] += batch["attention_mask"].numel()
        self._sums["documents"] += len(batch["truncated"])
        self._sums["truncated"] += sum(batch["truncated"])
        if not ends_logged_step(trainer, batch_idx):
            return
        self._read_tensors()
        self._read_loader(cast(Any, trainer).datamodule)
        # Ranks have different sources, so plain objects are gathered, and only now.
        total = sum_counts(self._sums)
        self._sums.clear()
        self.latest = data_metrics(total)
        log_metrics(trainer, self.latest)

    def _read_tensors(self) -> None:
        losses, tokens = zip(*self._waiting, strict=True)
        values = torch.cat(losses, dim=1).tolist()
        for source, loss, supervised in zip(self._sources, *values, strict=True):
            self._sums[f"loss/{source}"] += loss
            self._sums[f"supervised/{source}"] += supervised
        self._sums["tokens"] += int(torch.stack(tokens).sum())
        self._sources.clear()
        self._waiting.clear()

    def _read_loader(self, data: Any) -> None:
        """Read the counters of a WebDataModule; other DataModules have none."""
        if not hasattr(data, "wait_seconds"):
            return
        now, waited = time.monotonic(), data.wait_seconds
        self._sums["seconds"], self._sums["waited"] = now - self._before[0], waited - self._before[1]
        self._before = now, waited
        for source, reasons in data.skipped.items():
            for reason, count in reasons.items():
                self._sums[f"skipped_{reason}/{source}"] = count
                self._sums[f"skipped_{reason}"] += count


def sum_counts(sums: Mapping[str, float]) -> dict[str, float]:
    """Add up counts whose names may differ from rank to rank."""
    ranks = gather(dict(sums))
    return {name: sum(rank.get(name, 0) for rank in ranks) for rank in ranks for name in rank}


def data_metrics(total: Mapping[str, float]) -> dict[str, float]:
    """Return tag -> value of the logged metrics, from the sums over all ranks."""
    sources = [name.split("/", 1)[1] for name, count in total.items() if name.startswith("supervised/") and count]
    return {
        **{f"train/loss/{name}": total[f"loss/{name}"] / total[f"supervised/{name}"] for name in sources},
        "data/padding_share": 1 - total["tokens"] / total["positions"],
        "data/truncated": total["truncated"],
        "data/truncated_share": total["truncated"] / total["documents"],
        "data/real_tokens": total["tokens"],
        **({"data/wait_share": total["waited"] / total["seconds"]} if "seconds" in total else {}),
        **{f"data/{name}": count for name, count in total.items() if name.startswith("skipped_")},
    }
