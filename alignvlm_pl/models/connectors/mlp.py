"""MLP connector: one layer as in the paper, or two as in LLaVA-1.5's `mlp2x_gelu` (arXiv 2310.03744)."""

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..options import require_choice
from .base import Connector

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class MLPConnector(Connector):
    """MLP baseline.

    Args:
        layers: 2: linear, activation, linear (LLaVA's `mlp2x_gelu`); 1: linear, activation (paper).
        activation: `gelu` or `relu`.
        norm: Whether a LayerNorm follows, whose gain starts at the root mean square of the LM head's entries: visual
            tokens enter the LLM with the norm of text (arXiv 2512.08374).
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        layers: int = 2,
        activation: str = "gelu",
        norm: bool = False,
    ) -> None:
        super().__init__()
        require_choice("activation", activation, ACTIVATIONS)
        if layers not in (1, 2):
            raise ConfigError(f"connector layers={layers}: the MLP has 1 layer (paper) or 2 (LLaVA)")
        modules: list[nn.Module] = [nn.Linear(vision_dim, text_dim), ACTIVATIONS[activation]()]
        if layers == 2:
            modules.append(nn.Linear(text_dim, text_dim))
        self.norm = nn.LayerNorm(text_dim) if norm else None
        self.layers = nn.Sequential(*modules)

    @torch.no_grad()
    def initialize(self, head_weight: Tensor) -> None:
        """Set the gain of the norm from the LM head (V, D), which most small LLMs share with their embeddings."""
        if self.norm is not None:
            self.norm.weight.copy_(head_weight.float().square().mean().sqrt())
            self.norm.bias.zero_()

    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to (tiles, tokens, D)."""
        projected: Tensor = self.layers(features)
        return projected if self.norm is None else self.norm(projected)
