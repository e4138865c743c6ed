"""What the baselines share: a connector whose outputs are not distributions over text tokens."""

from torch import Tensor, nn

from ...errors import ConfigError
from ..align import ConnectorOutput


class Connector(nn.Module):
    """A connector; its subclass has `project` and, where the number of tokens changes, `tokens_per_tile`."""

    reads_text = False

    def initialize(self, head_weight: Tensor) -> None:
        """Start the weights that have a start of their own; `head_weight` (V, D) is the LM head.

        CONTRACT: runs after transformers has given every linear layer, convolution and embedding its normal start.
        """

    def tokens_per_tile(self, tokens: int) -> int:
        """Tokens that the LLM sees for a tile of which the vision tower gives `tokens`.

        Raises:
            ConfigError: If the connector was built for another number.
        """
        return tokens

    def project(self, features: Tensor) -> Tensor:
        """Turn features (tiles, tokens, d) into (tiles, tokens_per_tile(tokens), D)."""
        raise NotImplementedError

    def forward(self, features: Tensor, table: Tensor, *, columns: Tensor | None = None) -> ConnectorOutput:
        """Project features (tiles, tokens, d); the LLM's embedding `table` is not read.

        Raises:
            ConfigError: If `columns` is given: the outputs are not distributions over text tokens.
        """
        if columns is not None:
            raise ConfigError(f"{type(self).__name__} has no P_vocab to read out; use connector type 'align'")
        return ConnectorOutput(self.project(features))
