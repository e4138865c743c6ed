"""Rows of one call of `generate` that end at token limits of their own, and whose text is streamed as it is made."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class RowLimits(StoppingCriteria):
    """End each row of a batch after its own number of new tokens; for one call of `generate`.

    It counts its calls, one a token, as a prompt without its blanks is shorter than the one given.
    """

    def __init__(self, limits: Sequence[int]) -> None:
        self._limits = torch.tensor(limits)
        self._made = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._made += 1
        return (self._limits <= self._made).to(input_ids.device)


class RowStreamer(BaseStreamer):
    """Hand the text of each row on as it is made; for one call of `generate`.

    What is handed on of a row joins to its whole text without white space at both ends. Characters of which a token
    has a part, and white space, wait for the tokens behind them.

    Args:
        decode: Token ids to text.
        limits: New tokens of each row, at most.
        ends: Token ids that end a row.
        on_text: Called with a row and its next text, in the thread that generates.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        limits: Sequence[int],
        ends: Collection[int],
        on_text: Callable[[int, str], None],
    ) -> None:
        self._decode, self._limits, self._ends, self._on_text = decode, limits, ends, on_text
        self._tokens: list[list[int]] = [[] for _ in limits]
        self._sent = [0] * len(limits)
        self._at_prompt = True

    def put(self, value: Tensor) -> None:
        if self._at_prompt:  # `generate` hands the prompt on first
            self._at_prompt = False
            return
        for row, token in enumerate(value.tolist()):
            tokens = self._tokens[row]
            if len(tokens) < self._limits[row] and (not tokens or tokens[-1] not in self._ends):
                tokens.append(token)
                self._send(row, whole=False)

    def end(self) -> None:
        for row in range(len(self._tokens)):
            self._send(row, whole=True)

    def _send(self, row: int, *, whole: bool) -> None:
        text = self._decode(self._tokens[row]).strip()
        if len(text) > self._sent[row] and (whole or not text.endswith("\ufffd")):
            self._on_text(row, text[self._sent[row] :])
            self._sent[row] = len(text)


def row_tokens(made: Sequence[int], limit: int, ends: Collection[int]) -> tuple[list[int], bool]:
    """Return the tokens of a row up to its end or its limit, padding dropped, and whether it has ended by itself."""
    tokens = list(made[:limit])
    at = next((index for index, token in enumerate(tokens) if token in ends), None)
    return (tokens, False) if at is None else (tokens[: at + 1], True)
