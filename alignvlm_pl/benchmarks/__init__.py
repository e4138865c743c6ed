"""Benchmarks and their registry by name. Nothing here needs torch.

Those of the paper are in `published.yaml`; every `Benchmark` that a file of this folder defines is registered, too: to
add one, add a file (docs/extend/benchmark.md).
"""

from alignvlm_pl.errors import require_known
from alignvlm_pl.utils.registry import instances_in, load_instance

from .base import Benchmark, Prompt, Scoring, plain_benchmark
from .published import PUBLISHED

__all__ = ["BENCHMARKS", "Benchmark", "Prompt", "Scoring", "get_benchmark", "load_benchmark", "plain_benchmark"]

BENCHMARKS = PUBLISHED | instances_in(__name__, __path__, Benchmark)


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name, or a ConfigError; a name may come from data: import paths are not followed."""
    require_known(name, BENCHMARKS, f"there is no benchmark {name!r}")
    return BENCHMARKS[name]


def load_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name, or of the import path of a `Benchmark`, such as `mypackage.benchmarks.INVOICES`.

    Raises:
        ConfigError: There is none of this name, or the path names something else.
    """
    return load_instance(name, BENCHMARKS, Benchmark)
