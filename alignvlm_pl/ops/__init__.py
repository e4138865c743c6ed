"""The Align operator: softmax(LayerNorm(W2 · h) · gain + bias) · E_text, behind one function with several back-ends.

Plain torch: no model, no transformers, no Lightning.
"""

from .chunked import vocabulary_mass
from .operator import AUTO, BACKENDS, align, check_align_backend, choose_backend, full_weight
from .reference import AlignOutput

__all__ = [
    "AUTO",
    "BACKENDS",
    "AlignOutput",
    "align",
    "check_align_backend",
    "choose_backend",
    "full_weight",
    "vocabulary_mass",
]
