"""Answering one benchmark on all ranks: batches, progress bar, and a journal that outlives the process."""

from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.evaluation.batch_records import bad_records, batch_records, readout_records
from alignvlm_pl.scoring.metric import BenchmarkMetric
from alignvlm_pl.scoring.records import Record
from alignvlm_pl.training.module import AlignVLMModule

from .journal import Journal
from .preemption import abandon_if_asked


def answer(
    trainer: pl.Trainer,
    module: AlignVLMModule,
    name: str,
    benchmark: Benchmark,
    *,
    max_new_tokens: int | None,
    limit: int | None = None,
    journal: Journal | None = None,
) -> list[Record]:
    """Answer a benchmark's set on all ranks.

    Args:
        trainer: The trainer; its DataModule has the set.
        module: The module in eval mode.
        name: Name of the set.
        benchmark: What the set is.
        max_new_tokens: Longest answer in tokens; None: nothing is asked, the page is read from P_vocab.
        limit: Only the first samples.
        journal: Where answers are kept as they come, and taken from; None: nowhere.

    Returns:
        On every rank the records of all samples, each once, in the order of their keys; those that could not be read
        have an `ERROR`.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, unknown to its types
    metric = BenchmarkMetric(benchmark).to(module.device)
    done = _earlier(trainer, metric, journal)
    size = data.benchmark_size(name, limit=limit)
    bar = tqdm(
        total=size,
        initial=len(done),
        desc=name,
        unit="sample",
        leave=False,
        disable=not trainer.is_global_zero,
    )
    for batch in data.benchmark_dataloader(name, limit=limit, done=done):
        if max_new_tokens is None:
            records = readout_records(batch, module.read(batch))
        else:
            records = batch_records(batch, module.generate(batch, max_new_tokens=max_new_tokens))
        bad = bad_records(batch)
        records = [] if batch["filler"] else records
        metric.update([*records, *bad])
        if journal is not None:
            journal.append(batch["positions"], records)
        bar.update(min((len(records) + len(bad)) * trainer.world_size, size - bar.n))
        abandon_if_asked(trainer)
    bar.close()
    if journal is not None:
        journal.close()
    return metric.gather()


def _earlier(trainer: pl.Trainer, metric: BenchmarkMetric, journal: Journal | None) -> frozenset[int]:
    """Take up the answers that a killed run has left; return their positions, the same on all ranks."""
    if journal is None:
        return frozenset()
    found = journal.read() if trainer.is_global_zero else {}
    metric.update(found.values())
    done: list[int] = trainer.strategy.broadcast(sorted(found))
    journal.open(trainer.global_rank)  # after the broadcast: rank 0 has read all files
    return frozenset(done)
