"""AlignVLM in PyTorch Lightning: document vision-language models with the ALIGN connector.

Importing this package is cheap: torch and transformers are imported on the first access to a model class, so that
`prepare` and `score` start quickly.
"""

from typing import TYPE_CHECKING

from .utils.lazy import lazy_names
from .utils.version import __version__

if TYPE_CHECKING:
    from .models import AlignVLMConfig as AlignVLMConfig
    from .models import AlignVLMForConditionalGeneration as AlignVLMForConditionalGeneration
    from .models import AlignVLMProcessor as AlignVLMProcessor
    from .training.module import AlignVLMModule as AlignVLMModule

_HOME = {
    "AlignVLMConfig": ".models",
    "AlignVLMForConditionalGeneration": ".models",
    "AlignVLMProcessor": ".models",
    "AlignVLMModule": ".training.module",
}
__all__ = [*_HOME, "__version__"]
__getattr__, __dir__ = lazy_names(__name__, _HOME)
