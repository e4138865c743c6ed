"""Members of a tar sample -> `Sample`, and the count of skipped samples in training (no torch here)."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.utils.skipped import SkippedSamples

from .sample import UNLABELLED, Sample, SampleError, check_record, references
from .sample_formats import Adapter, NormalSample, RawSample, locate_sample, read_normal

logger = logging.getLogger(__name__)

# A share is judged on at least this many samples, so that one invalid page in the first ten does not stop a run.
MIN_JUDGED_SAMPLES = 200
LOG_EVERY = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """Turn a raw tar sample into a `Sample`; `adapter` reads the members of the source's format."""

    adapter: Adapter = read_normal

    def record(self, raw: RawSample) -> dict[str, Any]:
        """Return the JSON of one sample in the sample schema; its images are not read. Errors as in `__call__`."""
        return self._checked(raw)[0]

    def _checked(self, raw: RawSample) -> NormalSample:
        found = self.adapter(raw)
        check_record(found[0], num_images=len(found[1]), where=locate_sample(raw))
        return found

    def __call__(self, raw: RawSample, *, sizes: Sequence[tuple[int, int]] | None = None) -> Sample:
        """Decode one sample; `sizes` are those that the index has for its images, in pixels.

        SampleError: it is invalid, or differs from the index. DataError: the shard is damaged or of another format.
        """
        record, images, files = self._checked(raw)
        where = locate_sample(raw)
        try:
            opened = [load_image(data, name=f"{where}, {file}") for data, file in zip(images, files, strict=True)]
        except DataError as error:
            raise SampleError(str(error), "undecodable_image") from error
        found = [image.size for image in opened]
        if sizes is not None and list(sizes) != found:
            raise SampleError(
                f"{where}: its images have the sizes {found}, the index of its shard says {list(sizes)}; write the "
                "index again with `prepare index`",
                "size_mismatch",
            )
        return Sample(
            key=raw["__key__"],
            source=str(record.get("source", "unknown")),
            task=str(record.get("task", "vqa")),
            messages=record["messages"],
            images=opened,
            references=references(record),
            lines=list(record.get("lines", [])),
            sizes=found,
            meta=dict(record.get("meta", {})),
        )


@dataclass(kw_only=True, slots=True)
class SkipCounter:
    """Count skipped samples by source and reason, and stop the run above a share, 0 to 1, of those `seen`.

    `max_share` is that of invalid samples, `max_unlabelled` of those without a supervised token, which count apart.
    """

    max_share: float
    max_unlabelled: float = 1.0
    seen: int = 0
    skipped: dict[str, SkippedSamples] = field(default_factory=dict)
    _sent: dict[str, Counter[str]] = field(default_factory=dict)

    def skip(self, error: SampleError, *, source: str) -> None:
        """Count one skipped sample; DataError: more were skipped than allowed, or all of many."""
        found = self.skipped.setdefault(source, SkippedSamples(keep=1))
        found.add(error.reason, str(error))
        count = found.counts[error.reason]
        if count == 1 or count % LOG_EVERY == 0:
            logger.warning("skipped %d samples of %s for %s, last: %s", count, source, error.reason, error)
        total = sum(of_source.counts.total() for of_source in self.skipped.values())
        unlabelled = sum(of_source.counts[UNLABELLED] for of_source in self.skipped.values())
        judged = (
            (total - unlabelled, self.max_share, "max_skipped_share", "invalid"),
            (unlabelled, self.max_unlabelled, "max_unlabelled_share", "without anything to learn"),
        )
        for number, allowed, setting, what in judged:
            if number > allowed * max(self.seen, MIN_JUDGED_SAMPLES):
                raise DataError(
                    f"{number} of {self.seen} samples were {what} ({self._listing()}), more than the allowed share of "
                    f"{allowed:g} ({setting}); repair the shards or raise it. Last: {error}"
                )
        if total == self.seen >= MIN_JUDGED_SAMPLES:
            # Whatever shares are allowed: without a valid sample the endless stream would never give a batch.
            raise DataError(
                f"none of the first {self.seen} samples can be trained on ({self._listing()}); repair the shards, or "
                f"see whether they fit the settings. Last: {error}"
            )

    def _listing(self) -> str:
        counts: Counter[str] = Counter()
        for source, found in self.skipped.items():
            counts.update({f"{reason} of {source}": count for reason, count in found.counts.items()})
        return ", ".join(f"{name}: {count}" for name, count in counts.most_common() if count)

    def new_counts(self) -> dict[str, dict[str, int]]:
        """Return the counts since the last call, source -> reason -> number, to be sent with a batch."""
        now = {source: Counter(found.counts) for source, found in self.skipped.items()}
        fresh = {source: dict(counts - self._sent.get(source, Counter())) for source, counts in now.items()}
        self._sent = now
        return {source: reasons for source, reasons in fresh.items() if reasons}
