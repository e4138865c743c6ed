"""Members of a tar sample -> `Sample`; what happens to bad samples (no torch here).

Training skips a bad sample, counts it by reason and stops when the share of bad ones is too high;
evaluation never skips, because a benchmark without its hard pages is another benchmark.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alignvlm_pl.errors import DataError
from alignvlm_pl.imaging import load_image

from .normal_form import Adapter, RawSample, describe, read_normal
from .sample import Sample, SampleError, check_record, message_text

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

# A share is judged on at least this many samples, so that one bad page in the first ten does not stop a run.
MIN_JUDGED_SAMPLES = 200
LOG_EVERY = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Callable that turns a raw tar sample into a `Sample`.

    Attributes:
        adapter: Reads the members of the source's format; see normal_form.py.
        sources: Keep only samples of these sources; None keeps all.
    """

    adapter: Adapter = read_normal
    sources: frozenset[str] | None = None

    def __call__(self, raw: RawSample) -> Sample | None:
        """Decode one sample.

        Returns:
            The sample, or None where its source was not asked for.

        Raises:
            SampleError: This sample is bad.
            DataError: The shard is damaged or of another format.
        """
        record, images, files = self.adapter(raw)
        source = str(record.get("source", "unknown"))
        if self.sources is not None and source not in self.sources:
            return None
        where = describe(raw)
        check_record(record, num_images=len(images), where=where)
        try:
            opened = [
                load_image(data, name=f"{where}, {file}") for data, file in zip(images, files, strict=True)
            ]
        except DataError as error:
            raise SampleError(str(error), "undecodable_image") from error
        return Sample(
            key=raw["__key__"],
            source=source,
            task=str(record.get("task", "vqa")),
            messages=record["messages"],
            images=opened,
            references=list(record.get("references") or _last_answer(record["messages"])),
            lines=list(record.get("lines", [])),
            sizes=[image.size for image in opened],
            meta=dict(record.get("meta", {})),
        )


@dataclass(kw_only=True, slots=True)
class SkipCounter:
    """Counts skipped samples by reason and stops the run above a share.

    Attributes:
        max_share: Largest share of skipped samples that is tolerated, 0 to 1; 0 stops at the first.
        seen: Samples looked at.
        reasons: Skipped samples by reason.
    """

    max_share: float
    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    _taken: Counter[str] = field(default_factory=Counter)

    def skip(self, error: SampleError) -> None:
        """Count one bad sample.

        Raises:
            DataError: More samples were skipped than allowed.
        """
        self.reasons[error.reason] += 1
        count = self.reasons[error.reason]
        if count == 1 or count % LOG_EVERY == 0:
            logger.warning("skipped %d samples for %s, last: %s", count, error.reason, error)
        skipped = self.reasons.total()
        if skipped > self.max_share * max(self.seen, MIN_JUDGED_SAMPLES):
            listing = ", ".join(f"{reason}: {number}" for reason, number in self.reasons.most_common())
            raise DataError(
                f"{skipped} of {self.seen} samples were bad ({listing}), more than the allowed share of "
                f"{self.max_share:g} (max_skipped_share); repair the shards or raise it. Last: {error}"
            )

    def take(self) -> dict[str, int]:
        """Return the counts since the last call, to be sent with a batch."""
        fresh = self.reasons - self._taken
        self._taken = Counter(self.reasons)
        return dict(fresh)


def map_samples(
    items: Iterable[Any],
    function: Callable[[Any], Item | None],
    counter: SkipCounter | None,
    *,
    patience: int | None = None,
) -> Iterator[Item]:
    """Apply `function`, leaving out None; with a counter, bad samples are skipped, without one they raise.

    Args:
        items: Raw samples, possibly without end.
        function: Gives None for a sample that was not asked for.
        counter: Counts bad samples.
        patience: Items in a row without any result after which to stop; None never stops.

    Raises:
        SampleError: A bad sample and no counter.
        DataError: Too many bad samples, or `patience` items without a result.
    """
    fruitless = 0
    for item in items:
        fruitless += 1
        if counter is not None:
            counter.seen += 1
        try:
            result = function(item)
        except SampleError as error:
            if counter is None:
                raise
            counter.skip(error)
            continue
        if result is not None:
            fruitless = 0
            yield result
        elif patience is not None and fruitless >= patience:
            raise DataError(
                f"{fruitless} samples in a row were left out: no sample of the wanted sources is in the "
                "shards of this worker; choose other sources, fewer workers, or write the sets again shuffled"
            )


def _last_answer(messages: list[dict[str, Any]]) -> list[str]:
    return [message_text(messages[-1])] if messages[-1]["role"] == "assistant" else []
