"""Connectors behind one interface: tile features in, LLM-width tokens out.

A connector is an `nn.Module` with `forward(features (tiles, tokens, d), table (V, D), *, columns=None) ->
ConnectorOutput` and `initialize(head_weight)`, which is called once with the pretrained LM head (V, D). Its constructor
takes `vision_dim, text_dim, vocab_size` and keyword options, which are the keys of `connector:` in a config beside
`type`. `reads_text` says whether its weights are probabilities of text tokens (see `alignvlm_pl.readout`).
"""

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, nearest
from .align import AlignConnector, ConnectorOutput

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class MLPConnector(nn.Module):
    """Multi-layer perceptron baseline.

    Args:
        vision_dim: Width d of the vision features.
        text_dim: Width D of the LLM.
        vocab_size: Unused: part of the connector interface.
        layers: 2 is LLaVA's `mlp2x_gelu` (linear, activation, linear); 1 is the paper's form (linear, activation).
        activation: `gelu` or `relu`.
    """

    reads_text = False

    def __init__(
        self, vision_dim: int, text_dim: int, vocab_size: int, *, layers: int = 2, activation: str = "gelu"
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"connector activation {activation!r}: {nearest(activation, ACTIVATIONS)}")
        if layers not in (1, 2):
            raise ConfigError(f"connector layers={layers}: the MLP has 1 layer (paper) or 2 (LLaVA)")
        modules: list[nn.Module] = [nn.Linear(vision_dim, text_dim), ACTIVATIONS[activation]()]
        if layers == 2:
            modules.append(nn.Linear(text_dim, text_dim))
        self.layers = nn.Sequential(*modules)

    def initialize(self, head_weight: Tensor) -> None:
        """Nothing to take from the LM head."""

    def forward(self, features: Tensor, table: Tensor, *, columns: Tensor | None = None) -> ConnectorOutput:
        """Project features (tiles, tokens, d) to (tiles, tokens, D); `table` is not read.

        Raises:
            ConfigError: If `columns` is given: an MLP's outputs are not distributions over text tokens.
        """
        if columns is not None:
            raise ConfigError("the mlp connector has no P_vocab to read out; use connector type 'align'")
        return ConnectorOutput(self.layers(features))


CONNECTORS: dict[str, type[nn.Module]] = {"align": AlignConnector, "mlp": MLPConnector}


def build_connector(options: dict[str, Any], *, vision_dim: int, text_dim: int, vocab_size: int) -> nn.Module:
    """Build the connector named by `options["type"]`.

    Raises:
        ConfigError: If the type or one of its options is unknown; the message lists the known ones.
    """
    options = dict(options)
    name = options.pop("type", "align")
    if name not in CONNECTORS:
        raise ConfigError(f"connector type {name!r} is unknown: {nearest(str(name), CONNECTORS)}")
    known = [
        p.name for p in inspect.signature(CONNECTORS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    for key in options:
        if key not in known:
            raise ConfigError(f"connector {name!r} has no option {key!r}: {nearest(key, known)}")
    return CONNECTORS[name](vision_dim, text_dim, vocab_size, **options)
