"""When benchmarks are answered, and where their figures go: TensorBoard, predictions, results.json."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from alignvlm_pl.evaluation import (
    Record,
    answer_records,
    merge,
    overall,
    page_image,
    readout_records,
    summarize,
    write_predictions,
    write_results,
)
from alignvlm_pl.module import AlignVLMModule

log = logging.getLogger(__name__)


class BenchmarkEvaluation(pl.Callback):
    """Answer the benchmarks of the DataModule greedily and score them.

    In `validate` and `test` all samples are answered and `results.json` is written; in `fit` a subset is answered every
    n steps and at the end of the stage.

    Args:
        metrics: Names of `alignvlm_pl.metrics.METRICS`.
        readout_sets: Benchmarks that are not asked questions but read from P_vocab; their figure is `cer`, the
            character error rate with case ignored.
        every_n_steps: Interval in `fit`, in optimizer steps; null: not while training.
        at_stage_end: Whether to answer the subset when a stage has ended.
        subset: Samples of each benchmark answered in `fit`; null: all.
        max_new_tokens: Longest answer, in tokens.
        page_images: Page images kept of each benchmark.
    """

    def __init__(
        self,
        metrics: list[str] | None = None,
        readout_sets: list[str] | None = None,
        every_n_steps: int | None = None,
        at_stage_end: bool = True,
        subset: int | None = 32,
        max_new_tokens: int = 64,
        page_images: int = 16,
    ) -> None:
        self.metrics = metrics or ["anls", "exact_match", "relaxed_accuracy"]
        self.readout_sets = readout_sets or []
        self.every_n_steps = every_n_steps
        self.at_stage_end = at_stage_end
        self.subset = subset
        self.max_new_tokens = max_new_tokens
        self.page_images = page_images
        self.results: dict[str, dict[str, float]] = {}
        self._loss: dict[int, torch.Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer the subset every n optimizer steps."""
        step = trainer.global_step
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches
        if self.every_n_steps and step and step % self.every_n_steps == 0 and not accumulating:
            self._evaluate(trainer, pl_module, limit=self.subset)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer the subset at the end of the stage."""
        if self.at_stage_end and not trainer.interrupted:
            self._evaluate(trainer, pl_module, limit=self.subset)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the losses of the last validation."""
        self._loss.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add up the loss of a set over its tokens."""
        new = torch.stack([outputs["loss_sum"], outputs["num_supervised"]]).detach()
        self._loss[dataloader_idx] = self._loss.get(dataloader_idx, torch.zeros_like(new)) + new

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the losses; in `validate`, answer everything."""
        losses = self._log_losses(trainer)
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, limit=None, losses=losses)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let `predict` answer as `test` does."""
        assert isinstance(pl_module, AlignVLMModule)
        pl_module.max_new_tokens = self.max_new_tokens

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the losses and answer everything."""
        self._evaluate(trainer, pl_module, limit=None, losses=self._log_losses(trainer))

    def _log_losses(self, trainer: pl.Trainer) -> dict[str, float]:
        losses = {}
        for index, name in enumerate(_data(trainer).val_names):
            if index in self._loss:
                loss_sum, count = trainer.strategy.reduce(self._loss[index], reduce_op="sum").tolist()
                losses[name] = loss_sum / max(count, 1.0)
        _log(trainer, {f"val/{name}/loss": value for name, value in losses.items()})
        return losses

    def _evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        limit: int | None,
        losses: dict[str, float] | None = None,
    ) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        training = pl_module.training
        pl_module.eval()
        folder = Path(trainer.default_root_dir)
        tag = "" if limit is None else f"-step{trainer.global_step:06d}"
        self.results = {}
        for name in self._names(trainer, pl_module):
            records, pages = self._answer(trainer, pl_module, name, limit)
            if trainer.is_global_zero:
                records = merge(records, name=name, expected=_data(trainer).benchmark_size(name, limit=limit))
                self.results[name] = summarize(records)
                write_predictions(folder / "predictions" / f"{name}{tag}.jsonl", records)
                _write_pages(folder / "predictions" / "images" / name, pages)
                self._show(trainer, name, records, pages)
        if trainer.is_global_zero and limit is None:
            summary = {"overall": overall(self.results), "benchmarks": self.results, "loss": losses or {}}
            write_results(folder / "results.json", summary)
        pl_module.train(training)
        if training:
            pl_module.on_train_epoch_start()
        trainer.strategy.barrier("benchmarks")

    def _names(self, trainer: pl.Trainer, module: AlignVLMModule) -> list[str]:
        names: list[str] = _data(trainer).benchmark_names
        reads = module.net.connector.reads_text
        if module.stage is not None and module.stage.objective == "read":
            return [name for name in names if name in self.readout_sets]  # the LLM has learned nothing yet
        return [name for name in names if reads or name not in self.readout_sets]

    def _answer(
        self, trainer: pl.Trainer, module: AlignVLMModule, name: str, limit: int | None
    ) -> tuple[list[Record], dict[str, Any]]:
        """Records of one benchmark, gathered on rank 0, and its first page images."""
        records: list[Record] = []
        pages: dict[str, Any] = {}
        loader = _data(trainer).benchmark_dataloader(name, limit=limit)
        bar = tqdm(
            total=_data(trainer).benchmark_size(name, limit=limit),
            desc=name,
            unit="sample",
            leave=False,
            disable=not trainer.is_global_zero,
        )
        for batch in loader:
            if name in self.readout_sets:
                new = readout_records(batch, module.read(batch))
            else:
                answers = module.generate(batch, max_new_tokens=self.max_new_tokens)
                new = answer_records(batch, answers, self.metrics)
            bar.update(len(batch["keys"]) * trainer.world_size)
            if not batch["filler"]:
                records += new
                self._keep_pages(module, batch, pages)
        bar.close()
        return _gather(trainer, records), pages

    def _keep_pages(self, module: AlignVLMModule, batch: dict[str, Any], pages: dict[str, Any]) -> None:
        tiles = batch["pixel_values"].split(batch["num_tiles"].tolist())
        for key, own, sizes in zip(batch["keys"], tiles, batch["sizes"], strict=True):
            if len(pages) < self.page_images and sizes:
                pages[key] = page_image(own.cpu().numpy(), sizes[0], module.processor.geometry)

    def _show(self, trainer: pl.Trainer, name: str, records: list[Record], pages: dict[str, Any]) -> None:
        _log(trainer, {f"bench/{name}/{metric}": value for metric, value in self.results[name].items()})
        log.info("%s: %s", name, "  ".join(f"{key} {value:.4g}" for key, value in self.results[name].items()))
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        writer, step = trainer.logger.experiment, trainer.global_step
        shown = [record for record in records if record["key"] in pages][:4]
        for record in shown:
            writer.add_image(
                f"{name}/{record['key']}", np.asarray(pages[record["key"]]), step, dataformats="HWC"
            )
        lines = [
            f"- {r.get('question', '')} → **{r['prediction']}** ({' | '.join(r['references'])})"
            for r in shown
        ]
        writer.add_text(f"bench/{name}", "\n".join(lines), step)


def _data(trainer: Any) -> Any:
    return trainer.datamodule  # set by Lightning, unknown to its types


def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
    if trainer.logger is not None and values:
        trainer.logger.log_metrics(values, step=trainer.global_step)


def _write_pages(folder: Path, pages: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, page in pages.items():
        page.save(folder / f"{key}.png")


def _gather(trainer: pl.Trainer, records: list[Record]) -> list[Record]:
    if trainer.world_size == 1:
        return records
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, records)
    flat: Iterable[list[Record]] = parts
    return [record for part in flat for record in part]
