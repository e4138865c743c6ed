"""The rows of the LLM's vocabulary that a connector reads, of its embedding table and its head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops import full_weight
from .kept_rows import check_kept, read_kept
from .options import require_at_least


class VocabularyRows:
    """Part of a connector: the options `vocab_rows` and `vocab_keep`, and the rows that they choose.

    Attributes:
        vocab_size: Rows V of the LLM's head and embedding table.
        rows: Number of rows that are kept.
        kept: Their token ids, ascending; None: the first `rows`.
    """

    vocab_size: int
    rows: int
    kept: tuple[int, ...] | None

    def choose(self, vocab_size: int, vocab_rows: int | None, vocab_keep: str | Sequence[int] | None) -> None:
        """Keep the first `vocab_rows`, or those of `vocab_keep`, or all where both are None.

        Raises:
            ConfigError: If both are given, or rows are out of range or duplicate.
        """
        if vocab_keep is not None and vocab_rows is not None:
            raise ConfigError(
                f"connector: vocab_rows={vocab_rows} and vocab_keep both choose the rows to keep; set one of them"
            )
        rows = vocab_size if vocab_rows is None else vocab_rows
        require_at_least(1, vocab_rows=rows)
        if rows > vocab_size:
            raise ConfigError(f"connector vocab_rows={rows}: expected 1 to {vocab_size}, the LLM's vocabulary")
        self.kept = None
        if vocab_keep is not None:
            ids = read_kept(vocab_keep, vocab_size) if isinstance(vocab_keep, str) else vocab_keep
            self.kept = check_kept(ids, vocab_size, where="connector vocab_keep")
        self.vocab_size, self.rows = vocab_size, len(self.kept or range(rows))

    def row_ids(self) -> tuple[int, ...]:
        """Return the token ids of the kept rows, ascending."""
        return tuple(range(self.rows)) if self.kept is None else self.kept

    def select(self, table: Tensor) -> Tensor:
        """Return the kept rows of a (V, D) table, in the order of `row_ids`; a view if they are the first rows.

        Raises:
            ConfigError: If the table has fewer rows than the vocabulary that the connector was built for.
        """
        if table.shape[0] < self.vocab_size:
            raise ConfigError(
                f"the connector was built for a vocabulary of {self.vocab_size} but the embedding table has "
                f"{table.shape[0]} rows; head and table of the LLM must have the same (resize_token_embeddings)"
            )
        if self.kept is None:
            return table[: self.rows]
        # Not a buffer: loaders that build on the meta device lose buffers that are not in the checkpoint.
        kept = torch.tensor(self.kept).to(table.device, non_blocking=True)
        return full_weight(table).index_select(0, kept)

    def row_indices(self, columns: Tensor | Sequence[int], device: torch.device) -> Tensor:
        """Return the indices of token ids (C,) among the kept rows, on a device; raise a `ConfigError` for others."""
        ids = columns.tolist() if isinstance(columns, Tensor) else list(columns)  # a tensor's device is waited for
        row_of = range(self.rows) if self.kept is None else {token: row for row, token in enumerate(self.kept)}
        if absent := [token for token in ids if token not in row_of]:
            option = "vocab_rows" if self.kept is None else "vocab_keep"
            raise ConfigError(
                f"token id {absent[0]} is requested but {option} ({self.rows} of {self.vocab_size} rows) "
                "leaves it out; add it"
            )
        return torch.tensor([row_of[token] for token in ids]).to(device, non_blocking=True)
