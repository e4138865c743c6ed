"""Shards in, batches out: the DataModules, and the writer that makes shards. Loaded on first use.

Importing this package, its writer, its manifest reader or `datamodules.prepare` never imports torch.
"""

from typing import TYPE_CHECKING

from alignvlm_pl.utils.lazy import lazy_names

if TYPE_CHECKING:
    from .base import WebDataModule as WebDataModule
    from .benchmarks import BenchmarkDataModule as BenchmarkDataModule
    from .bigdocs import BigDocsDataModule as BigDocsDataModule
    from .cc12m import CC12MDataModule as CC12MDataModule
    from .docdownstream import DocDownstreamDataModule as DocDownstreamDataModule

# CONTRACT: alignvlm_pl/utils/installation.py compares this with the name of the distribution that ships the package.
__distribution__ = "alignvlm_pl"
_HOME = {
    "BenchmarkDataModule": ".benchmarks",
    "BigDocsDataModule": ".bigdocs",
    "CC12MDataModule": ".cc12m",
    "DocDownstreamDataModule": ".docdownstream",
    "WebDataModule": ".base",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy_names(__name__, _HOME)
