"""Throughput of training: tokens and tiles per second, model FLOPs utilisation, memory, and learning rates."""

import logging
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.training.flops import Work, count_pairs, peak_flops, stage_work
from alignvlm_pl.training.module import AlignVLMModule

from .data_health import sum_counts
from .outputs import log_metrics
from .step import ends_logged_step

log = logging.getLogger(__name__)


class Throughput(pl.Callback):
    """Log throughput every `trainer.log_every_n_steps` steps, over all ranks and all batches since the last log.

    - `perf/tokens_per_s`, `perf/tiles_per_s`: tokens that the LLM runs on, without padding and collapsed blanks, and
      tiles, per second of wall time. Waiting for data, evaluation and checkpoints are included in the time.
    - `perf/tflops_per_s`: model TFLOPs per second and device (alignvlm_pl/training/flops.py).
    - `perf/mfu`: these divided by the device's peak, 0 to 1.
    - `perf/memory_gib`: maximum over ranks of the peak memory, allocated by torch on a GPU, else resident.
    - `lr/<part>`: learning rate.

    Args:
        peak_tflops: Peak of one device in TFLOPs per second, above 0, for `perf/mfu`; null: `PEAK_TFLOPS` of
            alignvlm_pl/training/flops.py. A CPU and devices not in the table have no peak and log no `perf/mfu`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ConfigError(f"throughput.peak_tflops={peak_tflops}: expected a positive number, or null")
        self.peak = None if peak_tflops is None else peak_tflops * 1e12
        self.latest: dict[str, float] = {}  # the values logged last, shown by the progress bar
        self.work: Work | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._supervised: list[Tensor] = []  # on the device; read at the next log
        self._batches: list[tuple[list[int], list[int], Tensor | None]] = []  # tokens, tiles, kept tokens; as above
        self._tokens_per_tile = 0
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        if self.peak is None:
            self.peak = peak_flops(pl_module.device)
            if self.peak is None and pl_module.device.type == "cuda" and trainer.is_global_zero:
                name = torch.cuda.get_device_name(pl_module.device)
                log.warning("no peak is known of %s, so no MFU: set throughput.peak_tflops", name)
        try:
            self.work = stage_work(pl_module.net.config, pl_module.current_stage)
        except Exception as error:  # a custom model that cannot run without data must still train
            log.warning("no MFU: the work of this model cannot be counted (%s)", str(error)[:200])
        self._tokens_per_tile = pl_module.net.config.tokens_per_tile
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append((batch["tokens"], batch["tiles"], outputs.get("kept_tokens")))
        self._sums["tiles"] += sum(batch["tiles"])
        self._supervised.append(outputs["document_supervised"].sum())
        if not ends_logged_step(trainer, batch_idx):
            return
        self._sums["supervised"] = float(torch.stack(self._supervised).sum())
        self._supervised.clear()
        for batch_tokens in self._batches:
            tokens = run_tokens(*batch_tokens, tokens_per_tile=self._tokens_per_tile)
            self._sums["tokens"] += sum(tokens)
            self._sums["pairs"] += count_pairs(tokens)
        self._batches.clear()
        memory = f"memory/{trainer.global_rank}"
        self._sums[memory] = peak_memory(pl_module.device)
        total = sum_counts(self._sums)
        now = time.monotonic()
        self.latest = self.metrics(total, seconds=now - self._since, world_size=trainer.world_size)
        self._sums.clear()
        self._since = now
        for group in trainer.optimizers[0].param_groups:
            self.latest.setdefault(f"lr/{group['name'].partition('/')[0]}", group["lr"])
        log_metrics(trainer, self.latest)

    def metrics(self, total: Mapping[str, float], *, seconds: float, world_size: int) -> dict[str, float]:
        amounts = {name: total[name] for name in ("tiles", "tokens", "pairs", "supervised")}
        metrics = {
            "perf/tokens_per_s": total["tokens"] / seconds,
            "perf/tiles_per_s": total["tiles"] / seconds,
            "perf/memory_gib": max(v for name, v in total.items() if name.startswith("memory/")) / 2**30,
        }
        if self.work is not None:
            rate = self.work.total(**amounts) / seconds / world_size
            metrics["perf/tflops_per_s"] = rate / 1e12
            if self.peak is not None:
                metrics["perf/mfu"] = rate / self.peak
        return metrics


def run_tokens(tokens: list[int], tiles: list[int], kept: Tensor | None, *, tokens_per_tile: int) -> list[int]:
    """Return the tokens of each document that the LLM ran on: its tokens less the visual ones that were left out.

    `tiles` are those of each document, `kept` (tiles,) the visual tokens of each that stay; None: all.
    """
    if kept is None:
        return tokens
    rest = iter(kept.tolist())
    left_out = (sum(tokens_per_tile - next(rest) for _ in range(count)) for count in tiles)
    return [total - fewer for total, fewer in zip(tokens, left_out, strict=True)]


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in bytes: allocated by torch on a GPU, else resident in the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
