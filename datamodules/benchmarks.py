"""Benchmarks alone, for `test` and `predict` on a finished run; `prepare benchmark` makes their shards."""

from pathlib import Path
from typing import Any

from .base import WebDataModule
from .loading.benchmark_dataset import BenchmarkSource
from .shards.sample_formats import Adapter, read_docdownstream


class BenchmarkDataModule(WebDataModule):
    """Datasets that are evaluated and scored; nothing is trained.

    Args:
        benchmarks: Name -> folder of the datasets, or `{folder: …, benchmark: …}`, see `WebDataModule`.
        eval_batch_size: Samples per device in a batch.
        num_workers: Worker processes per device; 0 loads in the main process.
        **options: The other settings of `WebDataModule`.
    """

    def __init__(
        self,
        benchmarks: dict[str, str | Path | BenchmarkSource],
        eval_batch_size: int = 8,
        num_workers: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(benchmarks=benchmarks, eval_batch_size=eval_batch_size, num_workers=num_workers, **options)

    def adapter(self) -> Adapter:
        """Read the sample schema, or the records of DocDownstream."""
        return read_docdownstream
