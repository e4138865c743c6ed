"""Benchmarks and their registry by name. Nothing here needs torch.

Every `Benchmark` that a file of this folder defines is registered: to add one, add a file (docs/extend/benchmark.md).
"""

from alignvlm_pl.errors import ConfigError, nearest
from alignvlm_pl.utils.registry import instances_in, load_instance

from .base import Benchmark, Prompt, Scoring, plain_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Prompt", "Scoring", "get_benchmark", "load_benchmark", "plain_benchmark"]

BENCHMARKS = instances_in(__name__, __path__, Benchmark)


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name, or a ConfigError; a name may come from data: import paths are not followed."""
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def load_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name, or of the import path of a `Benchmark`, such as `mypackage.benchmarks.INVOICES`.

    Raises:
        ConfigError: There is none of this name, or the path names something else.
    """
    return load_instance(name, BENCHMARKS, Benchmark)
