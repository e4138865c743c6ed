"""ALIGN without its softmax: visual tokens are linear combinations of text embeddings, in place of averages.

Beside ALIGN it shows what the weights' being probabilities brings; all else is the same.
"""

import math

import torch
from torch import Tensor, nn

from ..align import STARTS, start_rows
from ..options import require_choice, require_positive
from .base import TextCombination


class AlignPlainConnector(TextCombination):
    """F' = LayerNorm(W2 · LayerNorm(W1 · F)) · E_text: equations 1 and 2 of the paper without the softmax.

    Args:
        gain_init: Initial gain of the vocabulary norm, in units of 1/√rows: at 1, a combination of independent text
            embeddings has the mean square of one of them.
        start: Where W2 starts, as ALIGN's; so are `eps`, `bias`, `vocab_rows` and `vocab_keep`.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        gain_init: float = 1.0,
        start: str = "lm_head",
        eps: float = 1e-5,
        bias: bool = True,
        vocab_rows: int | None = None,
        vocab_keep: str | list[int] | None = None,
    ) -> None:
        super().__init__()
        self.choose(vocab_size, vocab_rows, vocab_keep)
        require_choice("start", start, STARTS)
        require_positive(gain_init=gain_init, eps=eps)
        self.gain_init, self.start = gain_init, start
        self.w1 = nn.Linear(vision_dim, text_dim, bias=bias)
        self.norm1 = nn.LayerNorm(text_dim, eps=eps)
        self.w2 = nn.Linear(text_dim, self.rows, bias=False)
        self.norm2 = nn.LayerNorm(self.rows, eps=eps)

    @torch.no_grad()
    def initialize(self, head_weight: Tensor) -> None:
        """Initialise W2 by `start` from the LM head (V, D), and gain and bias of the norm."""
        self.w2.weight.copy_(start_rows(self.select(head_weight), self.start))
        self.norm2.weight.fill_(self.gain_init / math.sqrt(self.rows))
        self.norm2.bias.zero_()

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to coefficients (tiles, tokens, rows)."""
        coefficients: Tensor = self.norm2(self.w2(self.norm1(self.w1(features))))
        return coefficients
