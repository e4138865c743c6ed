"""The vocabulary rows that a pruned ALIGN keeps: check, read and choose lists of token ids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def check_kept(ids: Sequence[int], vocab_size: int, *, where: str) -> tuple[int, ...]:
    """Return the token ids to keep in ascending order; raise a `ConfigError` that begins with `where` if the list is
    empty, or an id is not an integer, out of range, or duplicate.
    """
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise ConfigError(f"{where}: expected a list of token ids, found {type(ids).__name__}")
    if invalid := [item for item in ids if isinstance(item, bool) or not isinstance(item, int)]:
        raise ConfigError(f"{where}: expected token ids (whole numbers), found {invalid[0]!r}")
    if not ids:
        raise ConfigError(f"{where} is empty: expected 1 to {vocab_size} token ids; null keeps all rows")
    if outside := [item for item in ids if not 0 <= item < vocab_size]:
        raise ConfigError(
            f"{where}: {len(outside)} of {len(ids)} ids are out of range, first {outside[0]}; the LLM's vocabulary has "
            f"{vocab_size} rows (0 to {vocab_size - 1})"
        )
    kept = sorted(set(ids))
    if len(kept) < len(ids):
        seen: set[int] = set()
        twice = next(item for item in ids if item in seen or seen.add(item))  # type: ignore[func-returns-value]
        raise ConfigError(f"{where}: {len(ids) - len(kept)} of {len(ids)} ids are duplicates, first {twice}")
    return tuple(kept)


def read_kept(path: str | Path, vocab_size: int) -> tuple[int, ...]:
    """Read token ids from a file: a JSON list, or an object with `kept` as `prune` writes it; raise a `ConfigError` if
    it cannot be read, is for another vocabulary, or its ids are invalid.
    """
    where = f"connector vocab_keep={str(path)!r}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; `prune` writes such files") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); expected a list of token ids") from error
    if isinstance(content, Mapping):
        if "kept" not in content:
            raise ConfigError(f"{where}: expected a list of token ids or an object with 'kept'")
        found = content.get("vocab_size", vocab_size)
        if found != vocab_size:
            raise ConfigError(
                f"{where} was made for a vocabulary of {found}, the LLM has {vocab_size}; run `prune` with this model"
            )
        content = content["kept"]
    return check_kept(content, vocab_size, where=where)


def resolve_kept(options: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """Replace a path in `vocab_keep` of connector options by its ids, so that a saved model needs no other file."""
    resolved = dict(options)
    if isinstance(path := resolved.get("vocab_keep"), str):
        resolved["vocab_keep"] = list(read_kept(path, vocab_size))
    return resolved


def choose_rows(
    shares: Sequence[float], *, mass: float | None = None, count: int | None = None, multiple: int = 1
) -> tuple[list[int], float]:
    """Choose the rows with the most probability mass, rounded up to a multiple as far as there are rows.

    `shares` are the mean P_vocab of every row. Kept are the fewest rows that have at least the share `mass` of the
    total, or at least `count` rows; one of the two is given. Returned are the ids in ascending order, and their share.

    Raises:
        ConfigError: If not exactly one of `mass` and `count` is given, or it or `multiple` is out of range.
    """
    if (mass is None) == (count is None):
        raise ConfigError("prune: give either --mass or --count")
    if mass is not None and not 0 < mass <= 1:
        raise ConfigError(f"prune --mass {mass}: expected a share above 0, at most 1, for example 0.99")
    if multiple < 1:
        raise ConfigError(f"prune --multiple {multiple}: expected at least 1")
    if count is not None and not 1 <= count <= len(shares):
        raise ConfigError(f"prune --count {count}: expected 1 to {len(shares)}, the rows of the model")
    total = sum(shares)
    order = sorted(range(len(shares)), key=lambda row: (-shares[row], row))
    carried = 0.0
    chosen: list[int] = []
    for row in order:
        enough = len(chosen) >= count if count is not None else carried >= (mass or 0.0) * total
        if enough and len(chosen) % multiple == 0:
            break
        chosen.append(row)
        carried += shares[row]
    return sorted(chosen), carried / total
