"""Perceiver Resampler in the form of Flamingo (arXiv 2204.14198, section 3.1.1; shapes as in OpenFlamingo).

The paper names it without sizes; the defaults are Flamingo's, whose LLM reads the latents by cross-attention. Here they
are input tokens, so a projection to the LLM's width follows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options import require_at_least, require_choice
from .base import Connector
from .grid import expand_to_tiles


class PerceiverConnector(Connector):
    """A fixed number of learned latents attends to each tile.

    Args:
        num_latents: Number of latents, which are the output tokens of a tile.
        depth: Number of layers.
        heads: Attention heads.
        head_dim: Width of one head.
        ff_mult: Hidden width of the feed-forward, as a multiple of d.
        projection: Projection of the latents to D: `linear`, or `mlp2x_gelu` (linear, GELU, linear).
    """

    keeps_places = False

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        num_latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        projection: str = "linear",
    ) -> None:
        super().__init__()
        require_at_least(1, num_latents=num_latents, depth=depth, heads=heads, head_dim=head_dim, ff_mult=ff_mult)
        require_choice("projection", projection, ("linear", "mlp2x_gelu"))
        self.latents = nn.Parameter(torch.randn(num_latents, vision_dim))
        self.layers = nn.ModuleList(
            PerceiverLayer(vision_dim, heads=heads, head_dim=head_dim, ff_mult=ff_mult) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(vision_dim)
        modules: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
        if projection == "mlp2x_gelu":
            modules += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        self.projection = nn.Sequential(*modules)

    def tokens_per_tile(self, tokens: int) -> int:
        return len(self.latents)

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to (tiles, num_latents, D)."""
        latents = expand_to_tiles(features, self.latents)
        for layer in self.layers:
            latents = layer(features, latents)
        projected: Tensor = self.projection(self.norm(latents))
        return projected


class PerceiverLayer(nn.Module):
    """Attention of the latents to the tile and to themselves, then a feed-forward, of width `dim`, without bias."""

    def __init__(self, dim: int, *, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, ff_mult * dim, bias=False),
            nn.GELU(),
            nn.Linear(ff_mult * dim, dim, bias=False),
        )

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Update latents (tiles, n, d) from media (tiles, tokens, d)."""
        latents = latents + self._attend(self.norm_media(media), self.norm_latents(latents))
        return latents + self.feed_forward(latents)

    def _attend(self, media: Tensor, latents: Tensor) -> Tensor:
        keys, values = self.to_kv(torch.cat([media, latents], dim=1)).chunk(2, dim=-1)
        query, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(latents), keys, values)
        )
        read = F.scaled_dot_product_attention(query, keys, values)  # (tiles, heads, n, head_dim)
        attended: Tensor = self.to_out(read.transpose(1, 2).flatten(2))
        return attended
