"""Ovis (arXiv 2405.20797): every visual token is a weighted average of the rows of a learned visual embedding table.

Shapes as in Ovis 1.6: a linear head without bias and a LayerNorm over the K - `indicators` visual words, and a table of
K rows, the last of which are indicators and not averaged. Unlike ALIGN, head and table are learned from scratch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..options import require_at_least, require_choice, require_positive
from .base import Connector
from .grid import TokenGrid, check_grid, expand_to_tiles, pixel_shuffle, shuffled_grid

_CHUNK_BYTES = 256 << 20
"""Size of the weights of visual words, in float32, of the tiles that run together; beyond it they run in chunks."""


class OvisConnector(Connector):
    """Visual embedding table.

    Args:
        visual_vocab: Rows K of the table; null: as many as the LLM's. The paper does not give K; Ovis used 16,384
            to 131,072.
        tokenize: `softmax`; `gumbel` (one word, sampled in training, else the most likely) or `argmax` (the most
            likely), both with the gradient of the softmax.
        tau: Temperature of `gumbel`, above 0; constant, where Ovis anneals it from 5 to 0.05.
        hidden_stride: Factor of the pixel shuffle before the head: 3 turns 729 tokens into 81.
        indicators: Number of last rows of the table that are not visual words: 5 in Ovis 1.6, 2 before.
        mark_tiles: Put the first two indicators before and after each tile's tokens.
        init_std: Standard deviation of the table's initialisation.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        grid: TokenGrid,
        visual_vocab: int | None = 65_536,
        tokenize: str = "softmax",
        tau: float = 1.0,
        hidden_stride: int = 1,
        indicators: int = 5,
        mark_tiles: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        require_choice("tokenize", tokenize, ("softmax", "gumbel", "argmax"))
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
        nn.init.normal_(self.table.weight, std=self.init_std)

    def tokens_per_tile(self, tokens: int) -> int:
        if self.stride > 1:
            check_grid(tokens, self.grid)
            rows, columns = shuffled_grid(self.grid, self.stride)
            tokens = rows * columns
        return tokens + 2 * self.mark_tiles

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to weighted averages of the table's rows (tiles, tokens_per_tile, D)."""
        tokens = self._average_rows(pixel_shuffle(features, self.grid, self.stride))
        if not self.mark_tiles:
            return tokens
        first, last = self.table.weight[self.words : self.words + 2].split(1)
        return torch.cat([expand_to_tiles(tokens, first), tokens, expand_to_tiles(tokens, last)], dim=1)

    def _average_rows(self, features: Tensor) -> Tensor:
        """Average the table's rows (tiles, tokens, D), a chunk of tiles at a time; chunks run again in backward.

        A page of nine tiles of SigLIP would keep 4 GiB of scores and weights for 65,536 visual words. A single tile is
        never divided, so that the count of FLOPs, made on one, holds no work twice.
        """
        tiles = max(1, _CHUNK_BYTES // (4 * self.words * features.shape[1]))
        if len(features) <= tiles:
            return self._average_chunk(features)
        return torch.cat([checkpoint(self._average_chunk, part, use_reentrant=False) for part in features.split(tiles)])

    def _average_chunk(self, features: Tensor) -> Tensor:
        return self.word_weights(features) @ self.table.weight[: self.words]

    def word_weights(self, features: Tensor) -> Tensor:
        """Return the visual words' weights (tiles, tokens, K - indicators) for (tiles, tokens, d · hidden_stride²)."""
        logits, dtype = self.head_norm(self.head(features)), self.table.weight.dtype
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.tokenize == "gumbel" and self.training:
            return F.gumbel_softmax(logits, tau=self.tau, hard=True).to(dtype)
        weights = logits.softmax(dim=-1)
        if self.tokenize != "softmax":
            hard = torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)
            weights = hard - weights.detach() + weights  # straight-through: value of `hard`, gradient of the softmax
        return weights.to(dtype)
