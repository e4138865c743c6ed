"""A dataset whose predictions are scored: its benchmark, problems and pages."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from alignvlm_pl.benchmarks import BENCHMARKS, Benchmark, get_benchmark, load_benchmark
from alignvlm_pl.benchmarks.base import with_prompt_files
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.scoring.problems import Problem

from ..shards.manifest import Manifest
from ..shards.reader import read_range
from ..shards.sample_formats import Adapter, locate_sample
from ..shards.skipped_rows import read_skipped_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSource:
    """A dataset that is scored, in a config.

    Attributes:
        folder: Folder of its shards.
        benchmark: Benchmark that it belongs to: a registered name or the import path of a `Benchmark`; None: what its
            manifest says, else the benchmark of the dataset's name, else none.
    """

    folder: str | Path
    benchmark: str | None = None

    @classmethod
    def from_config(cls, given: "str | Path | Mapping[str, Any] | BenchmarkSource") -> "BenchmarkSource":
        """Return the source that a folder or a mapping of the attributes stands for."""
        if isinstance(given, BenchmarkSource):
            return given
        return cls(**given) if isinstance(given, Mapping) else cls(folder=given)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkDataset:
    """A dataset by its name in the config, and its benchmark with the user's prompts; None: a custom dataset."""

    name: str
    manifest: Manifest
    benchmark: Benchmark | None

    @classmethod
    def from_manifest(
        cls, name: str, manifest: Manifest, prompts: Mapping[str, Path], benchmark: str | None = None
    ) -> "BenchmarkDataset":
        """Find the benchmark of a dataset: as the config says, else as the manifest says, else by its name.

        `prompts` are ``name`` or ``name/part`` -> the user's prompt file; DataError where it is not one. `benchmark` is
        that of `BenchmarkSource`; only a config may name an import path, which runs code. ConfigError: unknown names.
        """
        known = manifest.extra.get("benchmark")
        if benchmark is not None:
            found: Benchmark | None = load_benchmark(benchmark)
        else:
            found = get_benchmark(known) if known else BENCHMARKS.get(name)
        own = {part[len(name) + 1 :]: path for part, path in prompts.items() if part.split("/")[0] == name}
        return cls(name=name, manifest=manifest, benchmark=with_prompt_files(found, own, name=name))

    @property
    def expected(self) -> int | None:
        """Questions of the whole dataset, counted as the benchmark counts; None: not known."""
        origin = str(self.manifest.extra.get("origin", ""))
        return self.benchmark.size_from(origin) or None if self.benchmark else None

    @property
    def problems(self) -> list[Problem]:
        """Rows that `prepare` skipped, a line by reason."""
        first = self.manifest.extra.get("skipped_first") or {}
        folder = self.manifest.folder  # of a remote dataset, only the first rows are known
        rows = (read_skipped_rows(folder) if isinstance(folder, Path) else {}) or first
        found = []
        for reason, count in (self.manifest.extra.get("skipped") or {}).items():
            examples = f" ({'; '.join(first[reason])})" if reason in first else ""
            text = f"{count} rows skipped when it was prepared: {reason}{examples}"
            found.append(Problem(text, rows.get(reason, ())))
        return found

    def positions(self, *, limit: int | None = None, done: Collection[int] = ()) -> list[int]:
        """Return the positions of the first `limit` samples, or all, but those that are done."""
        size = self.manifest.num_samples if limit is None else min(limit, self.manifest.num_samples)
        return [position for position in range(size) if position not in done]

    def pages(self, keys: Collection[str], adapter: Adapter) -> Iterator[tuple[str, Image.Image]]:
        """Yield key and first image of the samples with these keys; those without an image are skipped."""
        wanted = set(keys)
        samples = read_range(self.manifest) if wanted else iter(())
        for raw in islice((raw for raw in samples if raw["__key__"] in wanted), len(wanted)):
            _, images, files = adapter(raw)
            if images:
                yield raw["__key__"], load_image(images[0], name=f"{locate_sample(raw)}, {files[0]}")
