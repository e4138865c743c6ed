"""Evaluation datasets to batches: every sample once over all ranks; samples that cannot be read are named and counted.

All ranks take the same number of batches, or collectives would hang: a rank that has fewer, and a batch of which no
sample can be read, gets a filler in their place.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from torch.utils.data import IterableDataset

from alignvlm_pl.preprocessing.batch import BadSample

from ..shards.decode import Decoder
from ..shards.manifest import Location, Manifest
from ..shards.reader import ShardReader
from ..shards.sample import SampleError
from .collate import Collator, EncodedSample
from .loader import WorkerItem, decode, with_errors, worker_and_count


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """What the model does with the batches of a loader. Each batch carries the three fields under the keys given here.

    Attributes:
        dataset: ``dataset``: name of the dataset in the config.
        kind: ``task``: ``loss`` (loss of the answers), ``generate`` (greedy predictions) or ``read`` (the text that the
            connector reads from the first image).
        max_new_tokens: ``max_new_tokens``: longest prediction of ``generate``, in tokens.
    """

    dataset: str
    kind: Literal["loss", "generate", "read"] = "loss"
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkOptions:
    """Which benchmarks the loaders of evaluation serve, and how; `callbacks.BenchmarkEvaluation` sets it.

    Attributes:
        names: Benchmarks that are served; None: all.
        subset: Number of first samples of each; None: all.
        read: Benchmarks that are read through the connector instead of being asked.
        max_new_tokens: Longest prediction in tokens, where the benchmark does not say.
        predicted: Name to positions of the samples that have a prediction already, the same on all ranks.
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

    Every sample is in exactly one batch of one rank. All ranks get the same number of batches, at least one: Lightning
    skips a loop without batches, and an evaluation that was killed behind its last batch would never be scored.

    Args:
        positions: Indices of the samples to evaluate, ascending; all of the dataset, or what a killed run has left.
        batch_size: Largest number of samples in a batch.
        rank: This process.
        world_size: Number of processes.
    """
    own = positions[len(positions) * rank // world_size : len(positions) * (rank + 1) // world_size]
    plan = [tuple(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
    most = max(math.ceil(math.ceil(len(positions) / world_size) / batch_size), 1)
    return plan + [()] * (most - len(plan))


class EvaluationBatches(IterableDataset[WorkerItem]):
    """The batches of an evaluation dataset that one rank takes.

    Beside the fields of the collator each has those of the task, ``positions`` of its samples in the dataset, and
    ``bad``, the samples that could not be read: a list of `BadSample`.

    Args:
        manifest: Manifest of the dataset.
        task: What the model does with the batches.
        plan: Batches of this rank; see `plan_evaluation`.
        decoder: Raw sample -> sample.
        collator: Sample -> encoded -> batch.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        task: EvaluationTask,
        plan: Sequence[tuple[int, ...]],
        decoder: Decoder,
        collator: Collator,
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.task = task
        self.plan = list(plan)
        self.decoder = decoder
        self.collator = collator

    def __iter__(self) -> Iterator[WorkerItem]:
        return with_errors(self._items())

    def _items(self) -> Iterator[WorkerItem]:
        worker, num_workers = worker_and_count()
        first, last = (len(self.plan) * part // num_workers for part in (worker, worker + 1))
        own = self.plan[first:last]
        samples = self._samples([position for part in own for position in part])
        for part in own:
            found = [next(samples) for _ in part]
            good = [
                (position, item) for position, item in zip(part, found, strict=True) if not isinstance(item, BadSample)
            ]
            items = [item for _, item in good]
            batch = self.collator.collate(items or [self.collator.filler()], filler=not items)
            batch["dataset"] = self.task.dataset
            batch["task"] = self.task.kind
            batch["max_new_tokens"] = self.task.max_new_tokens
            batch["positions"] = [position for position, _ in good]
            batch["bad"] = [item for item in found if isinstance(item, BadSample)]
            yield WorkerItem(batch=batch)

    def _samples(self, positions: Sequence[int]) -> Iterator[EncodedSample | BadSample]:
        reader = ShardReader()
        ends = list(accumulate(shard.num_samples for shard in self.manifest.shards))
        for position in positions:
            number = bisect_right(ends, position)
            shard = self.manifest.shards[number]
            start = ends[number] - shard.num_samples
            # Through the index: read in a row, the samples of another shard would be evaluated silently.
            location = Location(manifest=self.manifest, shard=shard, number=position - start)
            raw = reader.read(location)
            try:
                sample = decode(raw, decoder=self.decoder, sizes=reader.sizes(location))
                item = self.collator.encode(sample)
            except SampleError as error:
                yield BadSample(key=raw["__key__"], reason=error.reason, message=str(error))
            else:
                yield item
