"""Base classes of the connectors beside ALIGN, whose outputs are not distributions over text tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from ...errors import ConfigError
from ...ops import full_weight
from ..align import ConnectorOutput
from ..vocabulary_rows import VocabularyRows


class Connector(nn.Module, ABC):
    """Base class: subclasses implement `project` and, if the number of tokens changes, `tokens_per_tile`.

    The arguments `vision_dim`, `text_dim`, `vocab_size` and `grid` are described in the package.
    """

    reads_text = False
    keeps_places = True  # where there are as many outputs as inputs, each is at the place of its input

    def initialize(self, head_weight: Tensor) -> None:
        """Initialise weights from the LM head (V, D), after transformers' default initialisation."""

    def tokens_per_tile(self, tokens: int) -> int:
        """Return the number of output tokens for a tile of `tokens` vision tokens.

        Raises:
            ConfigError: If the connector was built for another number of vision tokens.
        """
        return tokens

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Map features (tiles, tokens, d) to (tiles, tokens_per_tile(tokens), D)."""

    def forward(
        self, features: Tensor, table: Tensor, *, columns: Tensor | Sequence[int] | None = None
    ) -> ConnectorOutput:
        """Map features (tiles, tokens, d); the LLM's embedding `table` is not used.

        Raises:
            ConfigError: If `columns` is given: the outputs are not distributions over text tokens.
        """
        if columns is not None:
            raise ConfigError(f"{type(self).__name__} has no P_vocab to read out; use connector type 'align'")
        return ConnectorOutput(self.project(features))


class TextCombination(VocabularyRows, Connector):
    """Base class of relatives of ALIGN: `project` gives coefficients (tiles, tokens, rows) of the LLM's text embeddings
    that are kept, and the outputs are these linear combinations.
    """

    def forward(
        self, features: Tensor, table: Tensor, *, columns: Tensor | Sequence[int] | None = None
    ) -> ConnectorOutput:
        """Combine the rows of `table` (V, D) for features (tiles, tokens, d): (tiles, tokens, D).

        Raises:
            ConfigError: If `columns` is given, or the table has fewer rows than the vocabulary.
        """
        coefficients = super().forward(features, table, columns=columns).embeds
        return ConnectorOutput(coefficients.to(table.dtype) @ full_weight(self.select(table)))
