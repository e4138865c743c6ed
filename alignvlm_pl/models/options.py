"""Checks of connector options."""

import math
from collections.abc import Collection
from typing import Any

from ..errors import ConfigError, require_known


def require_choice(key: str, value: str, known: Collection[str]) -> None:
    """Raise a `ConfigError` with the nearest known name if `value` is not known."""
    require_known(value, known, f"connector {key} {value!r}")


def require_at_least(lowest: int, **options: int) -> None:
    """Raise a `ConfigError` if an option is not an integer of at least `lowest`."""
    for key, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise ConfigError(f"connector {key}={value!r}: expected a whole number of at least {lowest}")


def require_positive(**options: float) -> None:
    """Raise a `ConfigError` if an option is not a finite number above 0."""
    for key, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ConfigError(f"connector {key}={value!r}: expected a number above 0")


def pair(key: str, value: Any) -> tuple[int, int]:
    """Return rows and columns of an option; raise a `ConfigError` if it is not a list of two integers of at least 1."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigError(f"connector {key}={value!r}: expected [rows, columns]")
    rows, columns = value
    require_at_least(1, **{f"{key}_rows": rows, f"{key}_columns": columns})
    return rows, columns
