"""Evaluation datasets -> batches, every sample once over all ranks; samples that cannot be read are named.

All ranks get the same number of batches, or collectives would hang: a filler stands for a batch that a rank lacks, or
of which no sample can be read.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch.utils.data import IterableDataset

from alignvlm_pl.preprocessing.batch import SkippedSample

from ..shards.decode import Decoder
from ..shards.manifest import Manifest
from ..shards.reader import ShardReader
from ..shards.sample import SampleError
from .collate import Collator, EncodedSample
from .loader import WorkerItem, with_errors, worker_and_count


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """Which benchmarks the evaluation loaders serve, and how: those of `names`, the first `subset` samples; None: all.

    Attributes:
        read: Benchmarks whose text the connector reads, in place of asking their questions.
        max_new_tokens: Longest prediction in tokens, where the benchmark does not say.
        predicted: Name -> positions of the samples that have a prediction already, the same on all ranks.
    """

    names: Collection[str] | None = None
    subset: int | None = None
    read: Collection[str] = ()
    max_new_tokens: int = 64
    predicted: Mapping[str, Collection[int]] = field(default_factory=dict)


def plan_evaluation(
    positions: Sequence[int], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[tuple[int, ...]]:
    """Split an evaluation dataset into the batches of one rank: positions of samples, none for a filler.

    Every one of the ascending `positions` is in exactly one batch of one rank. All ranks get the same number of
    batches, at least one, as Lightning skips a loop without batches and would not score what a killed run has left.
    """
    own = positions[len(positions) * rank // world_size : len(positions) * (rank + 1) // world_size]
    plan = [tuple(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
    most = max(math.ceil(math.ceil(len(positions) / world_size) / batch_size), 1)
    return plan + [()] * (most - len(plan))


@dataclass(kw_only=True)
class EvaluationBatches(IterableDataset[WorkerItem]):
    """The batches of an evaluation dataset on one rank, as `plan_evaluation` says.

    Beside the fields of the collator each has `dataset`, `task` and `max_new_tokens`, ``positions`` of its samples in
    the dataset, and ``skipped``, the samples that could not be read: a list of `SkippedSample`.

    The task is ``loss`` (loss of the answers), ``generate`` (greedy predictions of at most `max_new_tokens` tokens) or
    ``read`` (the text that the connector reads from the first image).
    """

    manifest: Manifest
    dataset: str
    task: Literal["loss", "generate", "read"] = "loss"
    max_new_tokens: int = 64
    plan: Sequence[tuple[int, ...]]
    decoder: Decoder
    collator: Collator

    def __iter__(self) -> Iterator[WorkerItem]:
        return with_errors(self._items())

    def _items(self) -> Iterator[WorkerItem]:
        worker, num_workers = worker_and_count()
        first, last = (len(self.plan) * part // num_workers for part in (worker, worker + 1))
        own = self.plan[first:last]
        samples = self._samples([position for part in own for position in part])
        for part in own:
            found = [next(samples) for _ in part]
            items = [item for item in found if isinstance(item, EncodedSample)]
            batch = self.collator.collate(items or [self.collator.filler()], filler=not items)
            batch["dataset"] = self.dataset
            batch["task"] = self.task
            batch["max_new_tokens"] = self.max_new_tokens
            batch["positions"] = [item.position for item in items if item.position is not None]
            batch["skipped"] = [item for item in found if isinstance(item, SkippedSample)]
            yield WorkerItem(batch=batch)

    def _samples(self, positions: Sequence[int]) -> Iterator[EncodedSample | SkippedSample]:
        reader = ShardReader()
        for position in positions:
            location = self.manifest.locate(position)
            raw = reader.read(location)
            item: EncodedSample | SkippedSample
            try:
                sample = self.decoder(raw, sizes=reader.row(location).sizes)
                item = replace(self.collator.encode(sample), position=position)
            except SampleError as error:
                item = SkippedSample(key=raw["__key__"], reason=error.reason, message=str(error))
            yield item
