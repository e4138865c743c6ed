"""Errors about user input, and a helper that suggests the most similar known name.

All are ValueErrors: a value of a config, a shard or a checkpoint is invalid. A message is short and has four parts:
where (file, key, setting), what was expected, what was found, what to do.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class AlignVLMError(ValueError):
    """Base class of all errors about user input; the command line prints them without a traceback."""

    def __str__(self) -> str:
        # A file name that is no UTF-8 has half a surrogate pair, which no log can write.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class ConfigError(AlignVLMError):
    """A setting is unknown, missing, invalid, or in conflict with another."""


class DataError(AlignVLMError):
    """A shard, sample, image or annotation is invalid."""


class NothingToLearnError(DataError):
    """A conversation has no supervised token: no answer, or all of the answer is beyond the text limit."""


class CheckpointError(AlignVLMError):
    """Weights or a checkpoint are missing, damaged, or of another model."""


class TrainingError(AlignVLMError):
    """Training cannot continue: a loss or a gradient is not finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an "unknown name" message: ``did you mean 'x'? known: a, b, x``.

    The question is left out if no name is similar.
    """
    names = sorted(set(known))
    listing = f"known: {', '.join(names) or 'none'}"
    by_lower = {candidate.lower(): candidate for candidate in names}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean '{by_lower[similar[0]]}'? {listing}" if similar else listing


def require_known(name: Any, known: Iterable[str], message: str, error: type[AlignVLMError] = ConfigError) -> None:
    """Raise an error for a name that is not known: the message, and the end that `nearest` adds to it."""
    known = list(known)
    if name not in known:
        raise error(f"{message}; {nearest(str(name), known)}")


def require_at_least(least: int, where: str, *, end: str = "", **settings: float | None) -> None:
    """Raise a ConfigError for the first setting below a number; None is not set.

    `where` stands before its name, and `end` behind the number: what else may be set, or why.
    """
    for name, value in settings.items():
        if value is not None and value < least:
            raise ConfigError(f"{where}{name}={value}: expected at least {least}{end}")
