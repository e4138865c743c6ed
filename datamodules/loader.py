"""Worker processes around the streams: they make whole batches; errors and skip counts travel with these.

Training keeps one set of workers and one endless iterator for life, so no epoch counter can restart in a
worker: an epoch is `steps_per_epoch` batches of it. Evaluation (evaluation.py) starts afresh each time.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from alignvlm_pl.errors import DataError

from .collate import Batch, Collator, EncodedSample
from .decode import Decoder, SkipCounter, map_samples
from .normal_form import RawSample
from .shards import TrainStream, permutation, total_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerItem:
    """What a worker hands over: a batch, or the message of the error that ended it.

    An error travels as text because torch would wrap an exception in the worker's whole traceback.
    """

    batch: Batch | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    error: str | None = None


class TrainBatches(IterableDataset[WorkerItem]):
    """Endless training batches of one worker.

    Args:
        stream: Order of the raw samples.
        decoder: Raw sample -> sample.
        collator: Sample -> encoded -> batch.
        batch_size: Samples in each batch.
        length_window: Batches that are sorted by length together; 1 keeps the order of the stream.
        max_skipped_share: See `SkipCounter`; None raises at the first bad sample.
    """

    def __init__(
        self,
        stream: TrainStream,
        *,
        decoder: Decoder,
        collator: Collator,
        batch_size: int,
        length_window: int = 1,
        max_skipped_share: float | None,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.decoder = decoder
        self.collator = collator
        self.batch_size = batch_size
        self.length_window = length_window
        self.max_skipped_share = max_skipped_share

    def __iter__(self) -> Iterator[WorkerItem]:
        return with_errors(self._items())

    def _items(self) -> Iterator[WorkerItem]:
        worker, num_workers = worker_place()
        counter = None if self.max_skipped_share is None else SkipCounter(max_share=self.max_skipped_share)
        encode = partial(decode_and_encode, decoder=self.decoder, collator=self.collator)
        # Two passes over everything without one usable sample: waiting longer gives nothing.
        patience = 2 * total_samples(self.stream.manifests)
        samples = map_samples(self.stream.samples(worker, num_workers), encode, counter, patience=patience)
        for items in _batches(samples, self.batch_size, window=self.length_window, seed=self.stream.seed):
            yield WorkerItem(batch=self.collator.collate(items), skipped=counter.take() if counter else {})


class ShardLoader:
    """Iterable of batches with a length, over a DataLoader whose workers make whole batches.

    Not a DataLoader itself, so that Lightning neither injects a sampler nor resizes it.

    Attributes:
        skipped: Samples left out so far, by reason, all workers of this rank together.
    """

    def __init__(
        self,
        dataset: IterableDataset[WorkerItem],
        *,
        num_batches: int,
        num_workers: int,
        start_method: str | None = None,
    ) -> None:
        """Prepare a loader; workers start with the first batch.

        Args:
            dataset: Makes the batches.
            num_batches: Batches per epoch, the same on all ranks.
            num_workers: Worker processes; 0 makes the batches in this process.
            start_method: ``fork``, ``spawn`` or ``forkserver``; None for the platform's default.
        """
        self.skipped: Counter[str] = Counter()
        self._num_batches = num_batches
        self._endless = isinstance(dataset, TrainBatches)
        self._iterator: Iterator[WorkerItem] | None = None
        self._loader: DataLoader[WorkerItem] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start_method if num_workers else None,
            # Its own generator: evaluating more often must not change the random numbers of training.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch; training goes on where the last epoch stopped.

        Raises:
            DataError: What a worker met: a damaged shard, too many bad samples, a bad evaluation sample.
        """
        if self._iterator is None or not self._endless:
            # Tokenizers must not run threads in forked workers, and warn unless told so.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self._iterator = iter(self._loader)
        for item in islice(self._iterator, self._num_batches):
            self.skipped.update(item.skipped)
            if item.error is not None:
                self.close()
                raise DataError(item.error)
            assert item.batch is not None, "a worker item holds a batch or an error"
            yield item.batch

    def close(self) -> None:
        """Stop the workers; the next epoch of training would start from the beginning."""
        self._iterator = None


def _batches(
    samples: Iterator[EncodedSample], size: int, *, window: int, seed: int | str
) -> Iterator[list[EncodedSample]]:
    """Cut a stream into batches; those of one window hold samples of like length, and come in random order.

    A batch is padded to its longest sample, so batches of like lengths waste less. The order of the batches is
    drawn anew, or the loss would swing with their length.
    """
    for number in count():
        block = list(islice(samples, size * window))
        if not block:
            return
        if window > 1:
            block.sort(
                key=lambda item: len(item.encoded.input_ids)
            )  # stable: equal lengths keep the stream's order
        batches = [block[start : start + size] for start in range(0, len(block), size)]
        yield from (batches[index] for index in permutation(len(batches), seed, number))


def decode_and_encode(raw: RawSample, *, decoder: Decoder, collator: Collator) -> EncodedSample | None:
    """Decode and encode one sample; None where its source was not asked for."""
    sample = decoder(raw)
    return None if sample is None else collator.encode(sample)


def with_errors(items: Iterator[WorkerItem]) -> Iterator[WorkerItem]:
    """Yield the items, and as the last one the message of the error that ended them."""
    try:
        yield from items
    except DataError as error:
        yield WorkerItem(error=str(error))


def worker_place() -> tuple[int, int]:
    """Return this worker and the number of workers; (0, 1) outside of a worker process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _start_worker(worker: int) -> None:
    """Leave signals to the main process: a forked worker must not save a checkpoint or requeue the job."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
