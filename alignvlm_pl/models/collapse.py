"""Collapse of blanks: visual tokens that show nothing are left out of the LLM's sequence.

P_vocab says of each visual token what it shows; on pages that is most often whitespace, as the paper finds. A run of
blank tokens within a row of a tile becomes its first token, or nothing if it is short and not the row's end, and
consecutive rows without any text the first token of the first of them, so columns and lines stay apart, and a tile
keeps at least one token. A thumbnail keeps all.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, nearest, require_known

NAMED = ("newline", "whitespace")
"""Names of `tokens`: the blank of the warm start `read`, and all tokens that decode to whitespace."""
_LONGEST_RUN = 64
_FIELDS = ("mass", "tokens", "min_run")


@dataclass(frozen=True, slots=True)
class Collapse:
    """A visual token is blank if P_vocab of the token ids `tokens` is above `mass` in sum; above 1 none ever is.

    A run of fewer than `min_run` blanks, as between the letters of a word, leaves no token where the row continues.
    """

    mass: float
    tokens: tuple[int, ...]
    min_run: int = 1

    @classmethod
    def from_option(cls, option: Mapping[str, Any], rows: Collection[int]) -> "Collapse":
        """Read the connector's option `collapse`, with token ids that are among the `rows` of P_vocab.

        Raises:
            ConfigError: A field is missing, unknown or out of range, or an id is none of the rows.
        """
        mass, tokens, min_run = _fields(option)
        if isinstance(tokens, str):
            raise ConfigError(
                f"connector collapse.tokens={tokens!r}: a name is replaced by token ids when a model is built from its "
                "parts (ModelSpec); give the ids"
            )
        if not tokens:
            raise ConfigError("connector collapse.tokens is empty: expected the token ids that mean blank")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or token not in rows:
                raise ConfigError(
                    f"connector collapse.tokens has {token!r:.40}, which is none of the {len(rows)} rows that "
                    "vocab_rows or vocab_keep keeps; add it there, or leave it out"
                )
        return cls(mass, tuple(tokens), min_run)

    def blank(self, log_probs: Tensor) -> Tensor:
        """Return which visual tokens are blank, (tiles, tokens) bool, for log P_vocab of `tokens`, as `kept`."""
        return log_probs.detach().logsumexp(dim=-1) > math.log(self.mass)

    def kept(self, log_probs: Tensor, grid: tuple[int, int], thumbnails: Tensor | None = None) -> Tensor:
        """Return which visual tokens stay, (tiles, tokens) bool, without gradient.

        `log_probs` (tiles, tokens, C) are log P_vocab of `tokens`, `grid` has the rows and columns of tokens of a tile,
        and `thumbnails` (tiles,) is true at tiles that keep all; None: there are none.
        """
        blank = self.blank(log_probs).unflatten(1, grid)
        empty = blank.all(dim=-1, keepdim=True)
        left_out = blank & _shifted(blank, dim=2) | empty & _shifted(empty, dim=1)
        if self.min_run > 1:
            left_out |= blank & ~empty & ~_in_long_run(blank, self.min_run)
        kept = ~left_out.flatten(1)
        return kept if thumbnails is None else kept | thumbnails[:, None]


def _in_long_run(blank: Tensor, length: int) -> Tensor:
    """Return which blanks of (tiles, rows, columns) are in a run of at least `length`: those that a window covers.

    Behind its end a row counts as blank, so that its last word stays apart from the next row's first.
    """
    ended = F.pad(blank, (0, length - 1), value=True)
    windows = F.pad(ended, (length - 1, 0)).unfold(2, length, 1).all(dim=-1)
    return windows.unfold(2, length, 1).any(dim=-1)


def _shifted(values: Tensor, *, dim: int) -> Tensor:
    """Return each value's predecessor along a dimension of (tiles, rows, columns); false at the first."""
    before = values.narrow(dim, 0, values.shape[dim] - 1)
    return F.pad(before, (1, 0) if dim == 2 else (0, 0, 1, 0))


def resolve_names(option: Any, tokenizer: Callable[[], Any], rows: Collection[int]) -> dict[str, Any]:
    """Return the option `collapse` with the token ids of a name of `NAMED`, those among the `rows` of P_vocab.

    `tokenizer` loads the LLM's, which is done for a name only.

    Raises:
        ConfigError: A field or name is unknown, or the tokenizer has no such token among the rows.
    """
    mass, name, min_run = _fields(option)
    if not isinstance(name, str):
        return {"mass": mass, "tokens": name, "min_run": min_run}
    if name not in NAMED:
        raise ConfigError(f"connector collapse.tokens={name!r}; {nearest(name, NAMED)}, or a list of token ids")
    loaded = tokenizer()
    found = loaded("\n", add_special_tokens=False)["input_ids"] if name == "newline" else _whitespace(loaded)
    tokens = [token for token in found if token in rows]
    if not tokens or (name == "newline" and len(found) != 1):
        raise ConfigError(
            f"connector collapse.tokens={name!r}: the tokenizer has {found[:5]} for it, and {tokens[:5]} of these are "
            f"among the {len(rows)} rows of P_vocab; give token ids, or keep their rows (vocab_rows, vocab_keep)"
        )
    return {"mass": mass, "tokens": tokens, "min_run": min_run}


def _whitespace(tokenizer: Any) -> list[int]:
    special = set(tokenizer.all_special_ids)
    texts = ((token, tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special)
    return [token for token, text in texts if text and not text.strip()]


def _fields(option: Any) -> tuple[float, Any, int]:
    """Return mass, checked, tokens, and shortest run, checked, of the option `collapse`."""
    if not isinstance(option, Mapping):
        raise ConfigError(f"connector collapse={option!r:.60}: expected {{mass: 0.5, tokens: newline}}, or null")
    for key in option:
        require_known(key, _FIELDS, f"connector collapse has no option {key!r}")
    mass, min_run = (_number(option.get(name, default)) for name, default in (("mass", None), ("min_run", 1)))
    if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass < math.inf:
        raise ConfigError(
            f"connector collapse.mass={mass!r:.40}: expected a number above 0, such as 0.5; above 1 nothing is left out"
        )
    if isinstance(min_run, bool) or min_run not in range(1, _LONGEST_RUN + 1):
        raise ConfigError(f"connector collapse.min_run={min_run!r:.40}: expected 1 to {_LONGEST_RUN} blanks")
    return float(mass), option.get("tokens", NAMED[0]), int(min_run)


def _number(value: Any) -> Any:
    """Return the number that a text is: jsonargparse reads one level of a mapping, and `collapse` is the second."""
    with suppress(TypeError, ValueError):
        return float(value) if isinstance(value, str) else value
    return value
