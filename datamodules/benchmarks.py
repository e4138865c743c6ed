"""Benchmarks alone, for `test` and `predict` on a finished run: nothing to train on, all samples answered.

Datasets are in the sample schema. `datamodules/prepare/sources/` reads the files that benchmarks are published
in, of which `prepare benchmark` makes such shards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import WebDataModule
from .loading.benchmark_dataset import BenchmarkSource
from .shards.sample import SampleError
from .shards.sample_formats import Adapter, NormalSample, RawSample, describe, read_docdownstream

__all__ = ["AnswerRequired", "BenchmarkDataModule"]


class BenchmarkDataModule(WebDataModule):
    """Datasets that are evaluated and scored; nothing is trained.

    Args:
        benchmarks: Name -> folder of the datasets, or `{folder: …, benchmark: …}`, see `WebDataModule`.
        eval_batch_size: Samples per device in a batch.
        num_workers: Worker processes per device; 0 loads in the main process.
        prompts: Benchmark, or ``benchmark/part`` -> file with the prompt to use in place of our own.
        **options: The other settings of `WebDataModule`, for sets that lie at a URL.
    """

    def __init__(
        self,
        benchmarks: dict[str, str | Path | BenchmarkSource],
        eval_batch_size: int = 8,
        num_workers: int = 2,
        prompts: dict[str, Path] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            benchmarks=benchmarks,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            prompts=prompts,
            **options,
        )

    def adapter(self) -> Adapter:
        """Read samples and refuse those without an accepted answer."""
        return AnswerRequired(read=read_docdownstream)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRequired:
    """Adapter that refuses samples which cannot be scored.

    Attributes:
        read: The adapter underneath.
    """

    read: Callable[[RawSample], NormalSample]

    def __call__(self, raw: RawSample) -> NormalSample:
        """Raise SampleError where there are neither references nor a last assistant turn."""
        record, images, files = self.read(raw)
        messages = record.get("messages") or [{}]
        if not record.get("references") and messages[-1].get("role") != "assistant":
            raise SampleError(f"{describe(raw)} has no 'references' and no answer: it cannot be scored", "no_answer")
        return record, images, files
