"""AlignVLM in PyTorch Lightning: document vision-language models with the ALIGN connector.

Importing this package is cheap: torch and transformers are imported on the first access to a model class, so that
`prepare` and `score` start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .models import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMProcessor
    from .training.module import AlignVLMModule

__all__ = [
    "AlignVLMConfig",
    "AlignVLMForConditionalGeneration",
    "AlignVLMModule",
    "AlignVLMProcessor",
    "__version__",
]

_HOME = {
    "AlignVLMConfig": ".models",
    "AlignVLMForConditionalGeneration": ".models",
    "AlignVLMProcessor": ".models",
    "AlignVLMModule": ".training.module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
