"""Worker processes around the stream: they make whole batches; errors, skip counts and cursors travel with these.

A rank's batches are numbered; of W workers, worker w makes those whose number leaves w when divided by W, and the
DataLoader takes them in turn. So the batches of a rank, and their order, do not depend on the number of workers.
Training keeps one set of workers and one endless iterator for life: an epoch is `steps_per_epoch` batches of it.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count, islice
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.batch import Batch, StepSummary, summary

from ..shards.decode import Decoder, SkipCounter
from ..shards.reader import ShardReader, is_no_image
from ..shards.sample import UNLABELLED, Sample, SampleError, message_text
from ..stream.batching import BatchPlanner, Row
from ..stream.state import Cursor
from ..stream.stream import TrainStream
from .collate import Collator, EncodedSample, answered_messages
from .workers import START_METHOD, collect_workers, init_worker, kill_workers, print_stacks, printing_stacks

Skipped = dict[str, dict[str, int]]
"""Source -> skip reason -> number of samples."""
_CHECKED_S = 5.0
"""Most seconds between two looks at whether the workers live."""
_ENDED_AFTER = 3
"""Periods of `stall_seconds` after which workers are killed."""
_PRINTING_S = 1.0
"""Time that they have to print their stacks before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerItem:
    """What a worker yields: a batch, or the message of the error that ended it, which torch would wrap in a traceback.

    The batch is None where every sample of it was skipped. `cursor` is the rest of the stream after it, see
    `Cursor.state_dict`, and `skipped` what was skipped for it.
    """

    batch: Batch | None = None
    cursor: dict[str, Any] | None = None
    skipped: Skipped = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "WorkerItem":
        """Return the item with its tensors in pinned memory; torch calls this where there is a GPU."""
        if self.batch is None:
            return self
        pinned = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in self.batch.items()}
        return replace(self, batch=cast(Batch, pinned))


@dataclass(kw_only=True)
class TrainBatches(IterableDataset[WorkerItem]):
    """Endless training batches of one rank, those of one worker.

    `stream` maps positions to samples, `planner` windows of positions to batches; `cursor` is what this rank has still
    to read. The `counter` stops at too many skipped samples; None: the first raises.
    """

    stream: TrainStream
    planner: BatchPlanner
    decoder: Decoder
    collator: Collator
    counter: SkipCounter | None
    cursor: Cursor = field(default_factory=Cursor)
    reader: ShardReader = field(default_factory=ShardReader)

    def __iter__(self) -> Iterator[WorkerItem]:
        return with_errors(self._items())

    def _items(self) -> Iterator[WorkerItem]:
        worker, num_workers = worker_and_count()
        number = count()
        for window, done, after in self.cursor.windows():
            batches = self.planner.plan(window, self._lengths)
            for index in range(done, len(batches)):
                if next(number) % num_workers == worker:
                    left = after if index + 1 == len(batches) else after.within(window, index + 1)
                    yield self._item(batches[index], left)

    def _item(self, rows: Sequence[Row], left: Cursor) -> WorkerItem:
        read = [[item for item in map(self.read, row) if item is not None] for row in rows]
        kept = [row for row in read if row]
        batch = self.collate(kept) if kept else None
        skipped = self.counter.new_counts() if self.counter else {}
        return WorkerItem(batch=batch, cursor=left.state_dict(), skipped=skipped)

    def collate(self, rows: Sequence[Sequence[EncodedSample]]) -> Batch:
        """Return the training batch of rows of samples, with the `positions` of its documents."""
        items = [item for row in rows for item in row]
        packed = self.planner.token_budget is not None
        batch = self.collator.collate_packed(rows) if packed else self.collator.collate(items)
        batch["positions"] = [item.position for item in items if item.position is not None]
        return batch

    def read(self, position: int) -> EncodedSample | None:
        """Return the sample at a position; None where it is skipped, which is counted.

        Raises:
            DataError: It is invalid and there is no counter, or too many were skipped; or its shard is damaged.
        """
        location = self.stream.locate(position)
        if self.counter is not None:
            self.counter.seen += 1
        try:
            sample = self.decoder(self.reader.read(location), sizes=self.reader.row(location).sizes)
            _require_answer(sample)
            encoded = self.collator.encode(sample, token_budget=self.planner.token_budget)
            return replace(encoded, position=position)
        except SampleError as error:
            if self.counter is None:
                raise
            self.counter.skip(error, source=self.reader.row(location).source)
            return None

    def _lengths(self, positions: Sequence[int]) -> list[int]:
        """Count the tokens of samples from their text and the sizes of their images; 0 where they are invalid."""
        found = []
        for position in positions:
            location = self.stream.locate(position)
            try:
                record = self.decoder.record(self.reader.read(location, wanted=is_no_image))
                length = self.collator.count_tokens(record, self.reader.row(location).sizes)
            except SampleError:
                length = 0
            found.append(0 if length > (self.planner.token_budget or length) else length)
        return found


class ShardLoader:
    """Iterable of batches with a length, over a DataLoader whose workers make whole batches.

    Not a DataLoader itself, so that Lightning neither injects a sampler nor resizes it. It has a length, so that
    Lightning fetches nothing ahead, and the cursor is that of the batches which were trained on.

    Attributes:
        cursor: The rest of the stream after the batches yielded so far; None before the first.
        skipped: Samples skipped so far by all workers of this rank, as `seen` those yielded, by source.
        wait_seconds: Seconds spent waiting for batches.
        workers: The worker processes that run.
    """

    def __init__(
        self,
        dataset: IterableDataset[WorkerItem],
        *,
        num_batches: int,
        num_workers: int,
        step_batches: int = 1,
        stall_seconds: float | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prepare a loader of `num_batches` an epoch, the same on all ranks; workers start with the first batch.

        `step_batches` are the micro batches of an optimizer step, which training fetches together. Without workers,
        this process makes the batches. After `stall_seconds` without a batch, and as many again, stacks are
        printed; after three times as many the workers are killed. For `pin_memory` see `DataLoader`.
        """
        self.cursor: dict[str, Any] | None = None
        self.skipped: dict[str, Counter[str]] = {}
        self.seen: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self.workers: list[BaseProcess] = []
        self._num_batches = num_batches
        self._step_batches = step_batches
        self._ahead: deque[WorkerItem] = deque()  # fetched, and not trained on yet
        self._endless = isinstance(dataset, TrainBatches)
        self._iterator: Iterator[WorkerItem] | None = None
        self._epoch = 0
        self._stall_seconds = stall_seconds
        self._loader: DataLoader[WorkerItem] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Dead workers, too, are noticed at a timeout only: they are children of the fork server.
            timeout=min(_CHECKED_S, stall_seconds / 5) if num_workers and stall_seconds else 0,
            multiprocessing_context=START_METHOD if num_workers else None,
            worker_init_fn=init_worker,
            # Its own generator: evaluating more often must not change the random numbers of training.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch; training continues where the last epoch stopped.

        Raises:
            DataError: The error of a worker: a damaged shard, too many skipped samples.
        """
        if self._iterator is None or not self._endless:
            self._start()
        self._epoch += 1
        epoch = self._epoch
        try:
            for number, batch in enumerate(islice(self._batches(), self._num_batches), 1):
                # Before the last batch: Lightning takes `len` batches and never reaches the end.
                if number == self._num_batches and not self._endless:
                    self.close()
                yield batch
        finally:
            if not self._endless and epoch == self._epoch:  # an evaluation that was stopped
                self.close()

    def _start(self) -> None:
        self.close()
        with collect_workers(self.workers) if self._loader.num_workers else nullcontext():
            self._iterator = iter(self._loader)

    def _batches(self) -> Iterator[Batch]:
        while self._fetch_step():
            step: list[StepSummary] | None = [
                summary(item.batch) for item in self._ahead if item.batch and self._endless
            ]
            while self._ahead:
                item = self._ahead.popleft()
                self.cursor = item.cursor
                if item.batch is None:
                    continue
                self.seen.update(item.batch["sources"])
                if self._endless:
                    item.batch["step"] = step
                yield item.batch
                step = None

    def _fetch_step(self) -> bool:
        """Fetch what is missing of an optimizer step; an epoch may have ended within the last one."""
        while sum(item.batch is not None for item in self._ahead) < self._step_batches:
            if (item := self._next()) is None:
                break
            for source, reasons in item.skipped.items():
                self.skipped.setdefault(source, Counter()).update(reasons)
            if item.error is not None:
                self.close()
                raise DataError(item.error)
            self._ahead.append(item)
        return bool(self._ahead)

    def _next(self) -> WorkerItem | None:
        if self._iterator is None:
            return None
        started, printed = time.monotonic(), 0
        with printing_stacks(None if self.workers else self._stall_seconds):
            while True:
                try:
                    item = next(self._iterator, None)
                    break
                except RuntimeError as error:
                    waited, stall = time.monotonic() - started, self._stall_seconds
                    # Torch has looked at the workers before it says so; after that, `next` may be called again.
                    if stall is None or not (self.workers and str(error).startswith("DataLoader timed out")):
                        raise _dead_workers(self.workers) or error from error
                    if printed < _ENDED_AFTER and waited >= stall * (printed + 1):
                        printed += 1
                        print_stacks(waited, self.workers)
                    elif printed == _ENDED_AFTER:  # and no batch has come while they printed
                        raise self._stalled(waited) from error
        self.wait_seconds += time.monotonic() - started
        return item

    def _stalled(self, waited: float) -> DataError:
        time.sleep(_PRINTING_S)
        self.close()
        return DataError(
            f"the data workers gave no batch for {waited:.0f} s and were killed; their stacks, printed above, "
            "show where they waited. Where the data is that slow, raise data.init_args.stall_seconds (0: wait for ever)"
        )

    def close(self) -> None:
        """Stop the workers; the next epoch of training would start from the beginning."""
        self._ahead.clear()
        self._iterator = None  # ends its workers, and waits some seconds for them
        kill_workers(self.workers)
        self.workers.clear()


def _dead_workers(workers: Sequence[BaseProcess]) -> DataError | None:
    """Return the error of workers that died; None where all run, or ended as their share of the data did."""
    dead = [f"pid {worker.pid}, exit code {worker.exitcode}" for worker in workers if worker.exitcode]
    if not dead:
        return None
    return DataError(
        f"a data worker died ({'; '.join(dead)}): out of memory, or its start failed as printed above; a script that "
        'trains needs `if __name__ == "__main__":`, and workers can import modules but no class of a notebook; '
        "num_workers: 0 loads in the training process"
    )


def _require_answer(sample: Sample) -> None:
    """Refuse a sample whose answers are all empty."""
    turns = answered_messages(sample.messages, sample.references)
    answers = [message_text(turn) for turn in turns if turn["role"] == "assistant"]
    # A conversation without a turn of the assistant is refused by the processor.
    if answers and not any(answer.strip() for answer in answers):
        raise SampleError(f"sample '{sample.key}' of {sample.source}: its answer is empty", UNLABELLED)


def with_errors(items: Iterator[WorkerItem]) -> Iterator[WorkerItem]:
    """Yield the items, and as the last one the message of the error that ended them."""
    try:
        yield from items
    except DataError as error:
        yield WorkerItem(error=str(error))


def worker_and_count() -> tuple[int, int]:
    """Return this worker and the number of workers; (0, 1) outside of a worker process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
