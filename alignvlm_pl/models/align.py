"""ALIGN: every visual token becomes a weighted average of the LLM's own text embeddings.

Paper, equations 1 and 2 (arXiv 2502.01341):

    P_vocab  = softmax(LayerNorm(W2 · LayerNorm(W1 · F)))     (tokens, V)
    F'_align = P_vocab · E_text                               (tokens, D)

The paper is silent on biases, the epsilon and whether E_text learns through (2). Here: W1 has a bias, W2 has none
and starts as a copy of the LM head, epsilon is 1e-5, and E_text is the LLM's live embedding table.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError


class ConnectorOutput(NamedTuple):
    """What a connector returns: `embeds` (tiles, tokens, D) and, if asked for, log P_vocab of some columns."""

    embeds: Tensor
    log_probs: Tensor | None = None


class AlignConnector(nn.Module):
    """Map vision features into the convex hull of the LLM's text embeddings (paper, section 3.1).

    Args:
        vision_dim: Width d of the vision features.
        text_dim: Width D of the LLM.
        vocab_size: Rows V of the LLM's head and embedding table.
        gain_init: Start of the vocabulary norm's gain. The paper's LayerNorm starts at 1; larger values start with
            sharper weights, which a short training budget needs.
        eps: Epsilon of both norms.
        bias: Whether W1 has a bias.
        vocab_rows: Keep only the first n rows of the vocabulary (in a BPE vocabulary: the bytes and the most frequent
            merges); null keeps all, as the paper's main runs do. The paper finds about 3.4K rows to carry the mass and
            to score the same; the cost of ALIGN falls with the rows.
    """

    reads_text = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        gain_init: float = 1.0,
        eps: float = 1e-5,
        bias: bool = True,
        vocab_rows: int | None = None,
    ) -> None:
        super().__init__()
        rows = vocab_size if vocab_rows is None else vocab_rows
        if not 1 <= rows <= vocab_size:
            raise ConfigError(
                f"connector vocab_rows={rows}: expected 1 to {vocab_size}, the LLM's vocabulary"
            )
        self.gain_init = gain_init
        self.vocab_size, self.rows = vocab_size, rows
        self.w1 = nn.Linear(vision_dim, text_dim, bias=bias)
        self.norm1 = nn.LayerNorm(text_dim, eps=eps)
        self.w2 = nn.Linear(text_dim, rows, bias=False)
        self.norm2 = nn.LayerNorm(rows, eps=eps)

    def tokens_per_tile(self, tokens: int) -> int:
        """One token for each that the vision tower gives."""
        return tokens

    @torch.no_grad()
    def initialize(self, head_weight: Tensor) -> None:
        """Copy the LM head into W2 and set the vocabulary norm's gain.

        Args:
            head_weight: (V, D) weight of the LLM's output head.

        Raises:
            ConfigError: If the head has another shape.
        """
        expected = (self.vocab_size, self.w1.out_features)
        if tuple(head_weight.shape) != expected:
            raise ConfigError(
                f"ALIGN was built for an LM head of shape {expected} but this one has {tuple(head_weight.shape)}; "
                "vocabulary and width must be the LLM's"
            )
        # A copy even where the head is tied to the embeddings: training W2 must not drag E_text (paper: "initialised").
        self.w2.weight.copy_(head_weight[: self.rows])
        self.norm2.weight.fill_(self.gain_init)
        self.norm2.bias.zero_()

    def forward(self, features: Tensor, table: Tensor, *, columns: Tensor | None = None) -> ConnectorOutput:
        """Average rows of `table` with the weights of equation 1.

        Args:
            features: (tiles, tokens, d) vision features.
            table: (V, D) the LLM's text embeddings.
            columns: Token ids whose log-probabilities to return as well, or None.

        Returns:
            `embeds` (tiles, tokens, D); `log_probs` (tiles, tokens, len(columns)) in float32, or None.
        """
        scores = self.scores(features)
        weights = scores.softmax(dim=-1).to(table.dtype)
        log_probs = None
        if columns is not None:
            log_probs = scores[..., self._check(columns)] - scores.logsumexp(dim=-1, keepdim=True)
        return ConnectorOutput(weights @ table[: self.rows], log_probs)

    def scores(self, features: Tensor) -> Tensor:
        """Normalised scores before the softmax, (tiles, tokens, rows), at least float32."""
        scores = self.norm2(self.w2(self.norm1(self.w1(features))))
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def log_probs(self, features: Tensor, columns: Tensor) -> Tensor:
        """Log P_vocab of the given columns only, (tiles, tokens, len(columns)), without mixing embeddings."""
        return F.log_softmax(self.scores(features), dim=-1)[..., self._check(columns)]

    def _check(self, columns: Tensor) -> Tensor:
        if int(columns.max()) >= self.rows:
            raise ConfigError(
                f"token id {int(columns.max())} is to be read out but vocab_rows={self.rows} leaves it out"
            )
        return columns
