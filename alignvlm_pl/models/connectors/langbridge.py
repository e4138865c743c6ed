"""LangBridge (arXiv 2503.19404): an MLP gives the coefficients of linear combinations of text embeddings.

As in its published code the coefficients pass no softmax, whatever the paper's summary says of a distribution, and no
gradient reaches the text embeddings, which are a frozen matrix there.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..align import ConnectorOutput
from ..options import require_at_least
from .base import TextCombination


class LangBridgeConnector(TextCombination):
    """F' = W3 · W2 · GELU(W1 · F) · E_text, of the rows that are kept.

    As published: there is no activation between W2 and W3.

    Args:
        width: Width of the hidden layers; null: the LLM's. Published: 5,120 for LLMs of 896 to 4,096.
        vocab_rows: Keep the first n rows of the vocabulary; null: all. Published: 19,200 tokens that Llama 3 and Qwen
            share and LLaVA's text uses most.
        vocab_keep: Keep these rows instead: a list of token ids, or the path of a file written by `prune`.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        width: int | None = None,
        vocab_rows: int | None = None,
        vocab_keep: str | list[int] | None = None,
    ) -> None:
        super().__init__()
        self.choose(vocab_size, vocab_rows, vocab_keep)
        width = text_dim if width is None else width
        require_at_least(1, width=width)
        layers = (nn.Linear(vision_dim, width), nn.GELU(), nn.Linear(width, width), nn.Linear(width, self.rows))
        self.layers = nn.Sequential(*layers)

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to coefficients (tiles, tokens, rows)."""
        coefficients: Tensor = self.layers(features)
        return coefficients

    def forward(
        self, features: Tensor, table: Tensor, *, columns: Tensor | Sequence[int] | None = None
    ) -> ConnectorOutput:
        return super().forward(features, table.detach(), columns=columns)
