"""Scores of one prediction against its accepted answers, and a registry of them by name.

Each metric of `METRICS` is a function `(prediction, references) -> float` in 0-1; a data set's figure is the
mean. Character error rate is not among them: it is summed over a corpus, see `character_error_rate`. Nothing
here needs torch.
"""

from collections.abc import Callable, Sequence

from alignvlm_pl.errors import ConfigError, nearest

from .anls import anls
from .cer import character_error_rate
from .exact import exact_match
from .relaxed import relaxed_accuracy

__all__ = [
    "METRICS",
    "Metric",
    "anls",
    "character_error_rate",
    "exact_match",
    "get_metric",
    "relaxed_accuracy",
]

Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "anls": anls,
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
}


def get_metric(name: str) -> Metric:
    """Look a metric up by the name used in configs and TensorBoard tags.

    Args:
        name: A key of `METRICS`.

    Raises:
        ConfigError: The name is unknown; the message lists the known ones.
    """
    if name not in METRICS:
        raise ConfigError(f"there is no metric {name!r}; {nearest(str(name), METRICS)}")
    return METRICS[name]
