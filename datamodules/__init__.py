"""Shards in, batches out: the DataModules, and the writer that makes shards. Loaded on first use.

Importing this package, its writer, its manifest reader or `datamodules.prepare` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import WebDataModule
    from .benchmarks import BenchmarkDataModule
    from .bigdocs import BigDocsDataModule
    from .cc12m import CC12MDataModule
    from .docdownstream import DocDownstreamDataModule

# CONTRACT: alignvlm_pl/utils/installation.py compares this with the name of the distribution that ships the package.
__distribution__ = "alignvlm_pl"
__all__ = [
    "BenchmarkDataModule",
    "BigDocsDataModule",
    "CC12MDataModule",
    "DocDownstreamDataModule",
    "WebDataModule",
]

_HOME = {
    "BenchmarkDataModule": ".benchmarks",
    "BigDocsDataModule": ".bigdocs",
    "CC12MDataModule": ".cc12m",
    "DocDownstreamDataModule": ".docdownstream",
    "WebDataModule": ".base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
