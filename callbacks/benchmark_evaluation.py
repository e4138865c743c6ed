"""Benchmarks in `fit`, `validate`, `test` and `predict`: gather the predictions of all ranks, score and write them."""

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from PIL import Image

from alignvlm_pl.benchmarks import Benchmark, plain_benchmark
from alignvlm_pl.errors import ConfigError, DataError, nearest, require_at_least
from alignvlm_pl.metrics import get_metric
from alignvlm_pl.models.connectors import connector_class
from alignvlm_pl.models.token_readout import has_places, read_page
from alignvlm_pl.scoring.journal import Journal, weights_identity
from alignvlm_pl.scoring.judge import grade, load_judge
from alignvlm_pl.scoring.readout_page import paint_readout
from alignvlm_pl.scoring.records import (
    Record,
    batch_records,
    file_name,
    merge_records,
    to_samples,
    unread,
    unread_records,
)
from alignvlm_pl.scoring.results import Losses
from alignvlm_pl.scoring.run import Scored, score_samples
from alignvlm_pl.strategies.sharding import is_sharded
from alignvlm_pl.training.module import AlignVLMModule
from alignvlm_pl.utils.atomic_files import write_predictions
from alignvlm_pl.utils.collectives import gather

from .connector_health import undisturbed
from .outputs import RunOutputs, predictions_path
from .step import is_trial

log = logging.getLogger(__name__)


class BenchmarkEvaluation(pl.Callback):
    """Score the benchmarks of the DataModule and write the results.

    `validate` and `test` evaluate all samples, and write `results.json` and the reports; after a kill they resume from
    the predictions on disk. In `fit`, each validation evaluates the first samples of each benchmark together with the
    losses of `val`. `predict` writes the predictions alone.

    Metrics are logged as `bench/<dataset>/<metric>`, or `bench_subset/<dataset>/<metric>` where a part of the dataset
    was evaluated on purpose; `trainer.callback_metrics` has them for EarlyStopping and ModelCheckpoint.

    Args:
        metrics: Names of `alignvlm_pl.metrics.METRICS`, for datasets that are no registered benchmark.
        readout_sets: Benchmarks whose text is read from P_vocab, in place of asking their questions; their metric is
            `cer`, the character error rate with case ignored.
        every_n_steps: Validate in `fit` every n optimizer steps, in place of `trainer.val_check_interval`; null: when
            the trainer does, or after the last step only where there are no `val` datasets and the trainer has no
            interval of its own.
        at_stage_end: Whether to validate after the last step of `fit`. With `every_n_steps` null and this false, `fit`
            evaluates no benchmark.
        subset: Samples of each benchmark evaluated in `fit`; null: all.
        max_new_tokens: Longest prediction in tokens, where the benchmark does not say.
        page_images: Page images written of each benchmark: half of first samples, half of the worst predictions.
        readout_pages: How many of them are also painted with what P_vocab reads at each place (`<key>.readout.png`),
            chosen alike; 0: none. Connectors without P_vocab have none.
        judge: ``module:function`` that grades predictions (MM-Vet); null: such predictions are kept, but not scored.

    `results` has `num` and metrics of each dataset in the last evaluation, as fractions of 1; on all ranks.
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
        readout_pages: int = 4,
        judge: str | None = None,
    ) -> None:
        self.metrics = tuple(metrics or ("anls", "exact_match", "relaxed_accuracy"))
        for metric in self.metrics:
            get_metric(metric)
        where = "benchmark."
        require_at_least(1, where, end=", or null", every_n_steps=every_n_steps, subset=subset)
        require_at_least(1, where, max_new_tokens=max_new_tokens)
        require_at_least(0, where, page_images=page_images, readout_pages=readout_pages)
        self.readout_sets = readout_sets or []
        self.every_n_steps = every_n_steps
        self.at_stage_end = at_stage_end
        self.subset = subset
        self.max_new_tokens = max_new_tokens
        self.page_images = page_images
        self.readout_pages = readout_pages
        self.judge = None if judge is None else load_judge(judge)
        self.results: dict[str, dict[str, float]] = {}
        self._names: list[str] = []  # benchmarks that are served
        self._records: dict[str, list[Record]] = {}
        self._unread_losses: dict[str, int] = {}
        self._journals: dict[str, Journal] = {}
        self._last_step = -1  # at which a validation of `fit` has ended

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the benchmarks that the DataModule serves, before its loaders are built; open the journals."""
        assert isinstance(pl_module, AlignVLMModule)
        self._names, self._journals = [], {}
        if not _serves_benchmarks(trainer):
            return
        self.check_readout_sets(_data(trainer).benchmarks)
        if stage == "fit":
            self._set_interval(trainer)
            return  # `on_fit_start` knows the stage's objective
        self._names = self._chosen(trainer, pl_module)
        self._require_work(trainer)
        if stage == "predict" or is_trial(trainer):
            self._serve(trainer)
            return
        self._journals = {name: self._journal(trainer, pl_module, name) for name in self._names}
        found = {name: journal.read() if trainer.is_global_zero else {} for name, journal in self._journals.items()}
        self._records = {name: list(records.values()) for name, records in found.items()}
        predicted = trainer.strategy.broadcast({name: sorted(records) for name, records in found.items()})
        for journal in self._journals.values():
            journal.open(trainer.global_rank)  # after the broadcast: rank 0 has read all files
        self._serve(trainer, predicted=predicted)

    def check_readout_sets(self, benchmarks: Mapping[str, Any]) -> None:
        """Raise a ConfigError for a name in `readout_sets` that is none of the benchmarks, where there are any."""
        for name in self.readout_sets if benchmarks else ():
            if name not in benchmarks:
                raise ConfigError(
                    f"benchmark.readout_sets names '{name}', which is not in data.init_args.benchmarks; "
                    f"{nearest(name, benchmarks)}"
                )

    def _require_work(self, trainer: pl.Trainer) -> None:
        data, command = _data(trainer), str(trainer.state.fn and trainer.state.fn.value)
        if not self._names and (command == "predict" or not data.val):
            why = "names no dataset"
            if data.benchmarks:
                why = f"has {', '.join(data.benchmarks)}, of benchmark.readout_sets, which this connector cannot read"
            other = "" if command == "predict" else ", and data.init_args.val names none"
            raise ConfigError(f"data.init_args.benchmarks {why}{other}: nothing to {command}; give a dataset")
        limit = f"limit_{'val' if command == 'validate' else command}_batches"
        if getattr(trainer, limit) == 0:
            raise ConfigError(f"trainer.{limit}=0: nothing to {command}; give a number above 0, or null for all")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        self._last_step = -1
        if not _serves_benchmarks(trainer):
            return
        if self.every_n_steps or self.at_stage_end:
            self._names = self._chosen(trainer, pl_module)
        self._serve(trainer, subset=self.subset)
        datasets = dict.fromkeys([*_data(trainer).val, *self._names])
        if trainer.limit_val_batches == 0 and datasets:
            log.warning(
                "trainer.limit_val_batches=0: fit does not evaluate %s; leave it out, or run `validate` afterwards",
                ", ".join(datasets),
            )

    def validation_interval(self, accumulate_grad_batches: int) -> dict[str, int | None]:
        """Return the settings of a Trainer that validates every `every_n_steps`; none where that is null."""
        if not self.every_n_steps:
            return {}
        return {"val_check_interval": self.every_n_steps * accumulate_grad_batches, "check_val_every_n_epoch": None}

    def _set_interval(self, trainer: pl.Trainer) -> None:
        """Set when `fit` validates; raise ConfigError where the trainer has another interval."""
        wanted = self.validation_interval(trainer.accumulate_grad_batches)
        if is_trial(trainer):
            return
        if not wanted:
            untouched = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
            if self.at_stage_end and untouched and not _data(trainer).val:
                wanted = {"val_check_interval": sys.maxsize, "check_val_every_n_epoch": None}
        elif trainer.val_check_interval not in (1.0, wanted["val_check_interval"]):
            raise ConfigError(
                f"trainer.val_check_interval={trainer.val_check_interval} and benchmark.every_n_steps="
                f"{self.every_n_steps} both set when fit validates; leave one of them out"
            )
        for name, value in wanted.items():
            setattr(trainer, name, value)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop training after the last step, upon which Lightning validates."""
        if self.at_stage_end and self._names and trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the last validation was preempted: the resumed run does not repeat it."""
        step = trainer.global_step
        if not self.at_stage_end or not trainer.limit_val_batches or self._last_step == step:
            return
        folder, tag = Path(trainer.default_root_dir), None if self.subset is None else step
        missing = [name for name in self._names if not predictions_path(folder, name, step=tag).is_file()]
        if missing and trainer.is_global_zero:
            log.warning(
                "step %d: the validation at the end of fit was cut off, %s not evaluated; run `validate`",
                step,
                ", ".join(missing),
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the predictions of the last validation; keep those from journals."""
        if not self._journals:
            self._records = {}
        self._unread_losses = {}

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        name = batch.get("dataset", "")
        if "predictions" not in outputs:
            for sample in batch.get("skipped", ()):
                log.warning("skipped for the loss (%s): %s", sample.reason, sample.message)
                self._unread_losses[name] = self._unread_losses.get(name, 0) + 1
        elif not trainer.sanity_checking:
            self._keep(batch, outputs["predictions"], outputs.get("references"))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, AlignVLMModule)
        if trainer.sanity_checking:
            return
        self._last_step = trainer.global_step
        if self._names or (trainer.state.fn != "fit" and _serves_benchmarks(trainer)):
            self._evaluate(trainer, pl_module)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if "dataset" in batch:
            self._keep(batch, outputs)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write `predictions/<dataset>.jsonl` below the run folder, with the samples of all ranks."""
        for name, records in gather_records(self._records, self._names).items():
            if trainer.is_global_zero and not is_trial(trainer):
                write_predictions(predictions_path(Path(trainer.default_root_dir), name, step=None), records)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for journal in self._journals.values():
            journal.close()

    def _keep(self, batch: Any, predictions: list[str], references: list[str] | None = None) -> None:
        name = batch["dataset"]
        records = [] if batch["filler"] else batch_records(batch, predictions, read=references)
        self._records.setdefault(name, []).extend([*records, *unread_records(batch)])
        if name in self._journals:
            self._journals[name].append(batch["positions"], records)

    def _evaluate(self, trainer: pl.Trainer, module: AlignVLMModule) -> None:
        """Score the predictions of all ranks; log the scores on all ranks, write them on the first."""
        limit = self.subset if trainer.state.fn == "fit" else None
        gathered, loss, data = gather_records(self._records, self._names), self._losses(trainer), _data(trainer)
        whole = {name: data.benchmark_size(name, limit=limit) == data.benchmark_size(name) for name in self._names}
        tags = {name: f"{'bench' if whole[name] else 'bench_subset'}/{name}" for name in self._names}
        metrics: dict[str, dict[str, float]] = {}
        found: dict[str, Scored] = {}
        if trainer.is_global_zero:
            found = {name: self._score(trainer, name, gathered[name], limit) for name in self._names}
        counts = {"page_images": self.page_images, "readout_pages": self.readout_pages}
        outputs = RunOutputs(trainer, module, **counts, whole=limit is None)
        for name in () if is_trial(trainer) else self._names:
            here = trainer.is_global_zero
            paint_pages(trainer, module, outputs.write_dataset(name, gathered[name], found[name]) if here else {})
        if trainer.is_global_zero:
            if limit is None and not is_trial(trainer):
                outputs.write_run(found, loss=loss, readout_sets=self.readout_sets)
            for name, scored in found.items():
                outputs.show(name, scored, tag=tags[name])
            metrics = {name: {"num": scored.num, **scored.metrics} for name, scored in found.items()}
        self.results = trainer.strategy.broadcast(metrics)
        for name, values in self.results.items():
            scores = {f"{tags[name]}/{metric}": float(value) for metric, value in values.items()}
            module.log_dict(scores, sync_dist=True)
        for journal in self._journals.values():
            journal.close()
        trainer.strategy.barrier("results written")
        for journal in self._journals.values() if trainer.is_global_zero else ():
            journal.remove()
        trainer.strategy.barrier("journals removed")

    def _losses(self, trainer: pl.Trainer) -> Losses:
        """Return the losses of the `val` datasets, which the module has logged; all ranks must call it."""
        logged, unread = trainer.callback_metrics, gather(self._unread_losses)
        names = [name for name in _data(trainer).val if f"val/{name}/loss" in logged]
        counts = {name: sum(rank.get(name, 0) for rank in unread) for name in names}
        unreadable = "{} samples could not be read: the log names them"
        problems = {name: [unreadable.format(count)] for name, count in counts.items() if count}
        return Losses(values={name: float(logged[f"val/{name}/loss"]) for name in names}, problems=problems)

    def _serve(self, trainer: pl.Trainer, **options: Any) -> None:
        _data(trainer).set_benchmark_options(
            names=self._names, read=self.readout_sets, max_new_tokens=self.max_new_tokens, **options
        )

    def _chosen(self, trainer: pl.Trainer, module: AlignVLMModule) -> list[str]:
        """Return the benchmarks that the model, and the stage's objective, can be evaluated on."""
        names: list[str] = list(_data(trainer).benchmarks)
        reads = getattr(connector_class(module.spec.connector.get("type", "align")), "reads_text", False)
        if module.stage is not None and module.stage.objective != "answer":  # the LLM is not trained yet
            return [name for name in names if reads and name in self.readout_sets]
        return [name for name in names if reads or name not in self.readout_sets]

    def _benchmark(self, trainer: pl.Trainer, name: str) -> Benchmark:
        if name in self.readout_sets:
            return plain_benchmark(name, metrics=("cer",))
        registered: Benchmark | None = _data(trainer).benchmark_dataset(name).benchmark
        return registered or plain_benchmark(name, metrics=self.metrics)

    def _score(self, trainer: pl.Trainer, name: str, records: list[Record], limit: int | None) -> Scored:
        """Score the gathered records; raise DataError where some are missing and the trainer limits no batches."""
        size, dataset = _data(trainer).benchmark_size(name, limit=limit), _data(trainer).benchmark_dataset(name)
        benchmark = self._benchmark(trainer, name)
        problems = [*dataset.problems, *unread(records)]
        if len(records) != size:
            if not (setting := _limit(trainer)):
                raise DataError(f"benchmark {name!r}: {len(records)} predictions for {size} samples")
            problems.append(f"{len(records):,} of {size:,} samples: {setting}")
        samples = to_samples(records)
        if any(scoring.load()[0].needs_judge for scoring in benchmark.scorings):
            samples = grade(samples, self.judge) if self.judge else samples
            if missing := sum(sample.meta.get("judged") is None for sample in samples):
                problems.append(f"{missing} predictions have no grade: set benchmark.judge")
                return Scored(benchmark=benchmark, samples=samples, scores=[{} for _ in samples], problems=problems)
        if limit is not None:  # part of the dataset on purpose
            return score_samples(benchmark, samples, resamples=0, problems=problems, whole=False)
        return score_samples(benchmark, samples, expected=dataset.expected, problems=problems)

    def _journal(self, trainer: pl.Trainer, module: AlignVLMModule, name: str) -> Journal:
        dataset = _data(trainer).benchmark_dataset(name)
        benchmark = self._benchmark(trainer, name)
        identity = {
            "set": dataset.manifest.sha256,
            "weights": weights_identity(trainer.ckpt_path or module.weights),
            "model": repr(module.spec),
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "precision": str(trainer.precision),
            "prompts": repr((benchmark.prompt, benchmark.prompts)),
            "max_new_tokens": None if name in self.readout_sets else benchmark.max_new_tokens or self.max_new_tokens,
        }
        return Journal(Path(trainer.default_root_dir) / "predictions" / "journal" / file_name(name), identity)


def gather_records(records: Mapping[str, list[Record]], names: Iterable[str]) -> dict[str, list[Record]]:
    """Gather the records of all ranks, dataset -> each key once, in key order; all ranks must call it."""
    ranks = gather(records)
    return {name: merge_records(record for rank in ranks for record in rank.get(name, ())) for name in names}


def paint_pages(trainer: pl.Trainer, module: AlignVLMModule, pages: Mapping[Path, Image.Image]) -> None:
    """Write what P_vocab reads on pages, path -> page, of rank 0; all ranks must call it."""
    net = module.net
    if not has_places(net) or not (trainer.is_global_zero or is_sharded(net)):
        return
    # The ranks of a sharded model run it equally often; the others on a blank page.
    count = trainer.strategy.broadcast(len(pages)) if is_sharded(net) else len(pages)
    if not count:
        return
    read = list(pages.values()) or [Image.new("RGB", (8, 8))] * count
    with undisturbed(trainer, module):
        tokens = [read_page(net, module.processor, page) for page in read]
    for (path, page), found in zip(pages.items(), tokens, strict=False):  # the other ranks have none
        paint_readout(page, found, most=math.log(net.connector.rows)).save(path)


def _data(trainer: Any) -> Any:
    return trainer.datamodule  # set by Lightning, unknown to its types


def _serves_benchmarks(trainer: pl.Trainer) -> bool:
    """Whether the DataModule has benchmarks: one of this project's."""
    return hasattr(_data(trainer), "set_benchmark_options")


def _limit(trainer: pl.Trainer) -> str:
    """Return the trainer's setting that limits the batches of an evaluation; empty where none does."""
    if is_trial(trainer):
        return "trainer.fast_dev_run"
    name = "limit_test_batches" if trainer.testing else "limit_val_batches"
    value = getattr(trainer, name)
    return "" if value == 1.0 and isinstance(value, float) else f"trainer.{name}={value}"
