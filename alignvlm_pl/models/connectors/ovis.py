"""Ovis: every visual token is a mixture of the rows of a visual vocabulary's own table (arXiv 2405.20797).

Shapes as in Ovis 1.6: a head of one linear layer without bias and a LayerNorm over the K - `indicators` visual words,
and a table of K rows whose last ones are indicators and take part in no mixture. Against ALIGN: the words and their
table are learned from nothing, where ALIGN takes both from the LLM.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import require_at_least, require_choice, require_positive
from .base import Connector
from .grid import Grid, check_grid, join_squares, repeat_for, shuffled_grid

TOKENIZERS = ("softmax", "gumbel", "argmax")


class OvisConnector(Connector):
    """Visual embedding table.

    Args:
        vision_dim: Width d of the vision features.
        text_dim: Width D of the LLM.
        vocab_size: Rows V of the LLM's table, for `visual_vocab: null`.
        grid: Rows and columns of the tokens of a tile.
        visual_vocab: Rows K of the table; null: as many as the LLM's. The paper names no number, Ovis had 16,384 to
            131,072.
        tokenize: `softmax`; `gumbel` (one word, drawn while training and the likeliest otherwise) or `argmax` (the
            likeliest), both with the gradient of the softmax.
        tau: Temperature of `gumbel`, above 0. It stays as it is set; Ovis lowers it from 5 to 0.05 while it trains.
        hidden_stride: Side of the squares of tokens that become one: 3 makes 81 of 729.
        indicators: Last rows of the table that are no words: 5 in Ovis 1.6, 2 before.
        mark_tiles: Put the first two indicators before and behind each tile's tokens.
        init_std: Standard deviation of the table's start.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        grid: Grid,
        visual_vocab: int | None = 65_536,
        tokenize: str = "softmax",
        tau: float = 1.0,
        hidden_stride: int = 1,
        indicators: int = 5,
        mark_tiles: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        require_choice("tokenize", tokenize, TOKENIZERS)
        require_at_least(1, hidden_stride=hidden_stride)
        require_at_least(2 if mark_tiles else 0, indicators=indicators)
        rows = vocab_size if visual_vocab is None else visual_vocab
        require_at_least(indicators + 2, visual_vocab=rows)
        require_positive(tau=tau, init_std=init_std)
        self.grid, self.stride, self.mark_tiles = grid, hidden_stride, mark_tiles
        self.tokenize, self.tau, self.init_std = tokenize, tau, init_std
        self.words = rows - indicators
        self.head = nn.Linear(vision_dim * hidden_stride**2, self.words, bias=False)
        self.head_norm = nn.LayerNorm(self.words)
        self.table = nn.Embedding(rows, text_dim)

    @torch.no_grad()
    def initialize(self, head_weight: Tensor) -> None:
        """Start the table from a normal distribution."""
        nn.init.normal_(self.table.weight, std=self.init_std)

    def tokens_per_tile(self, tokens: int) -> int:
        """One token for each square, and two marks where `mark_tiles` is set."""
        if self.stride > 1:
            check_grid(tokens, self.grid)
            rows, columns = shuffled_grid(self.grid, self.stride)
            tokens = rows * columns
        return tokens + 2 * self.mark_tiles

    def project(self, features: Tensor) -> Tensor:
        """Mixtures of the table's rows for features (tiles, tokens, d)."""
        squares = join_squares(features, self.grid, self.stride)
        weights = self.word_weights(squares)
        tokens = weights @ self.table.weight[: self.words]
        if not self.mark_tiles:
            return tokens
        first, last = self.table.weight[self.words : self.words + 2].split(1)
        return torch.cat([repeat_for(tokens, first), tokens, repeat_for(tokens, last)], dim=1)

    def word_weights(self, squares: Tensor) -> Tensor:
        """Weights of the visual words, (tiles, tokens, K - indicators), for (tiles, tokens, d · hidden_stride²)."""
        logits, dtype = self.head_norm(self.head(squares)), self.table.weight.dtype
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.tokenize == "gumbel" and self.training:
            return F.gumbel_softmax(logits, tau=self.tau, hard=True).to(dtype)
        weights = logits.softmax(dim=-1)
        if self.tokenize != "softmax":
            hard = torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)
            weights = hard - weights.detach() + weights  # the value of one, the gradient of the other
        return weights.to(dtype)
