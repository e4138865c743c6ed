"""The ALIGN connector: every visual token becomes a weighted average of the LLM's text embeddings.

Paper, equations 1 and 2 (arXiv 2502.01341):

    P_vocab  = softmax(LayerNorm(W2 · LayerNorm(W1 · F)))     (tokens, V)
    F'_align = P_vocab · E_text                               (tokens, D)

The paper does not specify biases, epsilon, or whether E_text gets gradients through (2). Here W1 has a bias, W2 has
none and is initialised from the LM head, epsilon is 1e-5, and E_text is the LLM's table itself, with gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import AUTO, align, check_align_backend
from .collapse import Collapse
from .options import require_choice, require_positive
from .vocabulary_rows import VocabularyRows


class ConnectorOutput(NamedTuple):
    """Inputs of the LLM (tiles, tokens, D), and log P_vocab (tiles, tokens, C) of requested columns or None."""

    embeds: Tensor
    log_probs: Tensor | None = None


STARTS = ("lm_head", "random")
"""Where W2 starts."""


def start_rows(head_rows: Tensor, start: str) -> Tensor:
    """Return the rows (R, D) that W2 starts with: those of the LM head, or random ones of their standard deviation."""
    return head_rows if start == "lm_head" else torch.randn_like(head_rows) * head_rows.std()


class AlignConnector(VocabularyRows, nn.Module):
    """Map vision features into the convex hull of the LLM's text embeddings (paper, section 3.1).

    Args:
        vision_dim: Width d of the vision features.
        text_dim: Width D of the LLM.
        vocab_size: Rows V of the LLM's head and embedding table.
        gain_init: Initial gain of the vocabulary norm. The paper's LayerNorm starts at 1; larger values give sharper
            weights from the start, which short training runs need.
        start: Where W2 starts: `lm_head` (paper), or `random`, normal with the head's standard deviation.
        eps: Epsilon of both norms.
        bias: Whether W1 has a bias.
        vocab_rows: Keep only the first n rows of the vocabulary (in a BPE vocabulary: the bytes and the most frequent
            merges); null keeps all, as the paper's main runs do. The paper reports the same scores with about 3.4K
            rows; the cost of ALIGN is proportional to the rows.
        vocab_keep: Keep these rows instead: a list of token ids, or the path of a file written by `prune`. Norm and
            softmax run over the kept rows, so the weights sum to one.
        collapse: Leave blank visual tokens out of the LLM's sequence: the fields of `collapse.Collapse`; null keeps
            all, as the paper does.
        backend: `auto`, or a key of `alignvlm_pl.ops.BACKENDS`.
        budget_gib: GiB of the two arrays of scores that `chunked` and `triton` use; null: 0.37 on a CPU, 1/32 of a
            GPU's memory but at most 3.

    Raises:
        ConfigError: If rows are out of range, duplicate, or given by both options, the back-end is unknown, `collapse`
            is invalid, the start is unknown, or gain, epsilon or budget is not a number above 0.
    """

    reads_text = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        vocab_size: int,
        *,
        gain_init: float = 1.0,
        start: str = "lm_head",
        eps: float = 1e-5,
        bias: bool = True,
        vocab_rows: int | None = None,
        vocab_keep: str | Sequence[int] | None = None,
        collapse: Mapping[str, Any] | None = None,
        backend: str = AUTO,
        budget_gib: float | None = None,
    ) -> None:
        super().__init__()
        self.choose(vocab_size, vocab_rows, vocab_keep)
        require_choice("start", start, STARTS)
        require_positive(gain_init=gain_init, eps=eps, **({} if budget_gib is None else {"budget_gib": budget_gib}))
        self.gain_init, self.start, self.backend = gain_init, start, check_align_backend(backend)
        self.budget = None if budget_gib is None else max(1, int(budget_gib * 2**30))
        self.collapse = None if collapse is None else Collapse.from_option(collapse, self.row_ids())
        self.w1 = nn.Linear(vision_dim, text_dim, bias=bias)
        self.norm1 = nn.LayerNorm(text_dim, eps=eps)
        self.w2 = nn.Linear(text_dim, self.rows, bias=False)
        self.norm2 = nn.LayerNorm(self.rows, eps=eps)

    def tokens_per_tile(self, tokens: int) -> int:
        return tokens

    @torch.no_grad()
    def initialize(self, head_weight: Tensor) -> None:
        """Initialise W2 by `start` from the LM head (V, D), and gain and bias of the norm.

        Raises:
            ConfigError: If the head has another shape than the connector was built for.
        """
        expected = (self.vocab_size, self.w1.out_features)
        if tuple(head_weight.shape) != expected:
            raise ConfigError(
                f"ALIGN was built for an LM head of shape {expected} but this one has {tuple(head_weight.shape)}; "
                "vocabulary and width must be the LLM's (for a head that is padded beyond the tokenizer set "
                "text_config.vocab_size to the padded size, and vocab_rows to leave the padding out)"
            )
        # A copy even if the head is tied to the embeddings: training W2 must not change E_text (paper: "initialised").
        self.w2.weight.copy_(start_rows(self.select(head_weight), self.start))
        self.norm2.weight.fill_(self.gain_init)
        self.norm2.bias.zero_()

    def forward(
        self, features: Tensor, table: Tensor, *, columns: Tensor | Sequence[int] | None = None
    ) -> ConnectorOutput:
        """Average the rows of `table` (V, D) with the weights of equation 1 for vision features (tiles, tokens, d).

        Returns:
            `embeds` (tiles, tokens, D); `log_probs` (tiles, tokens, C) in float32 of the token ids `columns`, or None.
        """
        output: ConnectorOutput = self._read(features, self.select(table), columns)
        return output

    def log_probs(self, features: Tensor, columns: Tensor | Sequence[int]) -> Tensor:
        """Return log P_vocab (tiles, tokens, C) of the token ids `columns` (C,), without averaging embeddings."""
        found: Tensor = self._read(features, None, columns).log_probs
        return found

    def _read(self, features: Tensor, table: Tensor | None, columns: Tensor | Sequence[int] | None) -> Any:
        norm = self.norm2
        found: Any = align(
            self.norm1(self.w1(features)).flatten(0, -2),
            self.w2.weight,
            norm.weight,
            norm.bias,
            table,
            columns=None if columns is None else self.row_indices(columns, features.device),
            eps=norm.eps,
            backend=self.backend,
            budget=self.budget,
        )
        outputs: Any = (one if one is None else one.unflatten(0, features.shape[:-1]) for one in found)
        return ConnectorOutput(*outputs)
