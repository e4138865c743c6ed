"""Benchmarks, one file each, and their registry by name. Nothing here needs torch.

Every `Benchmark` that a file of this folder defines is registered: to add one, add a file (docs/extend/benchmark.md).
"""

from alignvlm_pl.errors import ConfigError, nearest
from alignvlm_pl.utils.registry import defined_in

from .base import Benchmark, Prompt, Scoring, SourceFile, plain_benchmark, with_prompt_files

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Prompt",
    "Scoring",
    "SourceFile",
    "get_benchmark",
    "plain_benchmark",
    "with_prompt_files",
]


BENCHMARKS: dict[str, Benchmark] = {
    value.name: value for _, value in defined_in(__name__, __path__) if isinstance(value, Benchmark)
}
BENCHMARKS = dict(sorted(BENCHMARKS.items()))


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name.

    Raises:
        ConfigError: The name is unknown; the message lists the known ones.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
