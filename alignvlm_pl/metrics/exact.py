"""Exact match up to white space; there is no reference implementation."""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import collapse

RULES = ("exact",)


def exact_match(prediction: str, references: Sequence[str], *, rule: str = "exact") -> float:
    """Return 1 if the prediction equals a reference once white space is stripped and collapsed, else 0; case counts.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("exact_match", rule, RULES)
    text = collapse(prediction)
    return float(any(text == collapse(reference) for reference in references))


EXACT_MATCH: Metric = mean_metric("exact_match", exact_match, RULES)
