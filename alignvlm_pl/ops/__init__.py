"""The Align operator: softmax(LayerNorm(W2 · h) · gain + bias) · E_text, behind one function with several back-ends.

Plain torch: no model, no transformers, no Lightning.
"""

from .mixture import Mixture
from .operator import AUTO, BACKENDS, align, align_read, check_backend, choose_backend, gathered
from .products import vocabulary_mass

__all__ = [
    "AUTO",
    "BACKENDS",
    "Mixture",
    "align",
    "align_read",
    "check_backend",
    "choose_backend",
    "gathered",
    "vocabulary_mass",
]
