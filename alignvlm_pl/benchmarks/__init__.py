"""Benchmarks, one file each, and their registry by name. Nothing here needs torch.

Every `Benchmark` that a file of this folder defines is registered: to add one, add a file (docs/extend/benchmark.md).
"""

import pkgutil
from importlib import import_module

from alignvlm_pl.errors import ConfigError, nearest

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


def _defined() -> dict[str, Benchmark]:
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        values = vars(import_module(f"{__name__}.{module.name}")).values()
        found |= {value.name: value for value in values if isinstance(value, Benchmark)}
    return dict(sorted(found.items()))


BENCHMARKS: dict[str, Benchmark] = _defined()


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark of this name.

    Raises:
        ConfigError: The name is unknown; the message lists the known ones.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
