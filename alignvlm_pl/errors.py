"""Errors a user can meet, and the helper that proposes the name that was probably meant.

All are ValueErrors: a value that came from outside (a config, a shard, a checkpoint) is wrong. A message is
short and has four parts: what was expected, what was found, where (file, key, setting), what to do.
"""

import difflib
from collections.abc import Iterable


class AlignVLMError(ValueError):
    """Base of every error this project raises about its input; the CLI prints it without a traceback."""


class ConfigError(AlignVLMError):
    """A setting is unknown, missing, or in conflict with another one."""


class DataError(AlignVLMError):
    """A shard, sample, image or annotation is not what it should be."""


class NothingToLearnError(DataError):
    """A conversation has no supervised token: no answer, or all of it beyond the text limit."""


class CheckpointError(AlignVLMError):
    """Weights or training state are missing, damaged, or belong to another model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Describe the known names, the most similar one first; the tail of an "unknown name" message.

    Args:
        name: What the user wrote.
        known: The names that would have been right.

    Returns:
        ``did you mean 'x'? known: a, b, x``, without the question where nothing is similar.
    """
    names = sorted(set(known))
    listing = f"known: {', '.join(names) or 'none'}"
    by_lower = {candidate.lower(): candidate for candidate in names}
    similar = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"did you mean '{by_lower[similar[0]]}'? {listing}" if similar else listing
