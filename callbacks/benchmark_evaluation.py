"""When benchmarks are answered; what is asked and how it is scored is the benchmark's (alignvlm_pl/benchmarks)."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from alignvlm_pl.benchmarks import Benchmark, plain_benchmark
from alignvlm_pl.errors import DataError
from alignvlm_pl.scoring.judge import grade, load_judge, needs_judge, ungraded
from alignvlm_pl.scoring.records import Record, to_answers, unread
from alignvlm_pl.scoring.results import Losses
from alignvlm_pl.scoring.run import Scored, score_answers, without_figures
from alignvlm_pl.training.module import AlignVLMModule

from .answering import answer
from .averaged_weights import averaged
from .journal import Journal, weights_identity
from .outputs import log_metrics, predictions_path, show, write_run, write_set
from .preemption import EvaluationAbandoned

log = logging.getLogger(__name__)


class BenchmarkEvaluation(pl.Callback):
    """Answer the benchmarks of the DataModule greedily and score them.

    In `validate` and `test` all samples are answered, and `results.json` and the reports are written; killed half way,
    they go on where they stopped. In `fit` a subset is answered every n steps and at the end of the stage.

    Args:
        metrics: Names of `alignvlm_pl.metrics.METRICS`, for sets that are no registered benchmark.
        readout_sets: Benchmarks that are not asked questions but read from P_vocab; their figure is `cer`, the
            character error rate with case ignored.
        every_n_steps: Interval in `fit`, in optimizer steps; null: not while training.
        at_stage_end: Whether to answer the subset when a stage has ended.
        subset: Samples of each benchmark answered in `fit`; null: all.
        max_new_tokens: Longest answer in tokens, where the benchmark does not say.
        page_images: Page images kept of each benchmark: half of them first samples, half the worst answers.
        judge: ``module:function`` that grades open answers (MM-Vet); null: such answers are kept, but not scored.
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
        judge: str | None = None,
    ) -> None:
        self.metrics = tuple(metrics or ("anls", "exact_match", "relaxed_accuracy"))
        self.readout_sets = readout_sets or []
        self.every_n_steps = every_n_steps
        self.at_stage_end = at_stage_end
        self.subset = subset
        self.max_new_tokens = max_new_tokens
        self.page_images = page_images
        self.judge = None if judge is None else load_judge(judge)
        self.results: dict[str, dict[str, float]] = {}
        self._loss: dict[int, torch.Tensor] = {}
        self._loss_problems: dict[str, list[str]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer the subset if it was due at the step that the run goes on from, and its predictions are not there."""
        assert isinstance(pl_module, AlignVLMModule)
        if self._is_due(trainer.global_step):
            written = self.subset is not None and all(
                predictions_path(trainer, name, whole=False).is_file()
                for name in self._names(trainer, pl_module)
            )
            if not trainer.strategy.broadcast(written):
                self._look(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer the subset every n optimizer steps."""
        if self._is_due(trainer.global_step) and not trainer.fit_loop._should_accumulate():
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer the subset at the end of the stage."""
        if self.at_stage_end and not trainer.interrupted:
            self._look(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the losses of the last validation."""
        self._loss.clear()
        self._loss_problems.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add up the loss of a set over its tokens, and the samples that could not be read."""
        for bad in batch["bad"]:
            log.warning("left out of the loss (%s): %s", bad.reason, bad.message)
        bad_count = torch.full_like(outputs["loss_sum"], len(batch["bad"]))
        new = torch.stack([outputs["loss_sum"], outputs["num_supervised"], bad_count]).detach()
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
                sums = trainer.strategy.reduce(self._loss[index], reduce_op="sum").tolist()
                losses[name] = sums[0] / max(sums[1], 1.0)
                if sums[2]:
                    self._loss_problems[name] = [
                        f"{sums[2]:.0f} samples could not be read: the log names them"
                    ]
        log_metrics(trainer, {f"val/{name}/loss": value for name, value in losses.items()})
        return losses

    def _is_due(self, step: int) -> bool:
        return bool(self.every_n_steps and step and step % self.every_n_steps == 0)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer the subset, unless the run is asked to stop meanwhile."""
        with suppress(EvaluationAbandoned):
            self._evaluate(trainer, pl_module, limit=self.subset)

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
        found: dict[str, Scored] = {}
        journals: list[Journal] = []
        for name in self._names(trainer, pl_module):
            if limit is None:
                journals.append(self._journal(trainer, pl_module, name))
            with averaged(trainer, pl_module):
                records = answer(
                    trainer,
                    pl_module,
                    name,
                    self._benchmark(trainer, name),
                    max_new_tokens=None if name in self.readout_sets else self._longest(trainer, name),
                    limit=limit,
                    journal=journals[-1] if journals else None,
                )
            if trainer.is_global_zero:
                found[name] = self._score(trainer, name, records, limit)
                write_set(
                    trainer, name, records, found[name], page_images=self.page_images, whole=limit is None
                )
                show(trainer, name, found[name])
        if trainer.is_global_zero:
            self.results = {name: {"num": scored.num, **scored.figures} for name, scored in found.items()}
            if limit is None:
                loss = Losses(values=losses or {}, problems=self._loss_problems)
                write_run(trainer, found, loss=loss, readout_sets=self.readout_sets)
        trainer.strategy.barrier("benchmarks")
        for journal in journals if trainer.is_global_zero else ():
            journal.remove()
        pl_module.train(training)
        if training:
            pl_module.on_train_epoch_start()
        trainer.strategy.barrier("journals removed")

    def _names(self, trainer: pl.Trainer, module: AlignVLMModule) -> list[str]:
        names: list[str] = _data(trainer).benchmark_names
        reads = module.net.connector.reads_text
        if module.stage is not None and module.stage.objective == "read":
            return [name for name in names if name in self.readout_sets]  # the LLM has learned nothing yet
        return [name for name in names if reads or name not in self.readout_sets]

    def _benchmark(self, trainer: pl.Trainer, name: str) -> Benchmark:
        if name in self.readout_sets:
            return plain_benchmark(name, metrics=("cer",))
        registered: Benchmark | None = _data(trainer).benchmark_set(name).benchmark
        return registered or plain_benchmark(name, metrics=self.metrics)

    def _longest(self, trainer: pl.Trainer, name: str) -> int:
        return self._benchmark(trainer, name).max_new_tokens or self.max_new_tokens

    def _score(self, trainer: pl.Trainer, name: str, records: list[Record], limit: int | None) -> Scored:
        """Score the gathered records.

        Raises:
            DataError: There is not one for each sample: a figure over part of a set is not the benchmark's.
        """
        size = _data(trainer).benchmark_size(name, limit=limit)
        if len(records) != size:
            raise DataError(f"benchmark {name!r}: {len(records)} samples were answered, its set has {size}")
        benchmark, answered = self._benchmark(trainer, name), _data(trainer).benchmark_set(name)
        problems = [*answered.problems, *unread(records)]
        answers = to_answers(records)
        if needs_judge(benchmark):
            answers = grade(answers, self.judge) if self.judge else answers
            if missing := ungraded(answers):
                lacking = f"{missing} answers have no grade: set benchmark.judge"
                return without_figures(benchmark, answers, [*problems, lacking])
        if limit is not None:  # a look while training: a part of the set on purpose
            return score_answers(benchmark, answers, resamples=0, problems=problems, whole=False)
        return score_answers(benchmark, answers, expected=answered.expected, problems=problems)

    def _journal(self, trainer: pl.Trainer, module: AlignVLMModule, name: str) -> Journal:
        chosen = _data(trainer).benchmark_set(name)
        benchmark = self._benchmark(trainer, name)
        identity = {
            "set": chosen.manifest.sha256,
            "weights": weights_identity(trainer.ckpt_path or module.weights),
            "model": repr(module.spec),
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "precision": str(trainer.precision),
            "prompts": repr((benchmark.prompt, benchmark.prompts)),
            "max_new_tokens": None if name in self.readout_sets else self._longest(trainer, name),
        }
        return Journal(Path(trainer.default_root_dir) / "predictions" / "journal" / name, identity)


def _data(trainer: Any) -> Any:
    return trainer.datamodule  # set by Lightning, unknown to its types
