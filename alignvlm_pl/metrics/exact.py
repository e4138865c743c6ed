"""Exact match: the strictest question-answering score. It is our own; no reference implements it."""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import collapse

RULES = ("exact",)


def exact_match(prediction: str, references: Sequence[str], *, rule: str = "exact") -> float:
    """1 where the answer equals any reference, letter case included, else 0.

    Outer white space is ignored and inner white space collapsed to single spaces, on both sides.

    Args:
        prediction: The model's answer.
        references: All accepted answers.
        rule: `exact` is the only one.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("exact_match", rule, RULES)
    answer = collapse(prediction)
    return float(any(answer == collapse(reference) for reference in references))


EXACT_MATCH: Metric = mean_metric("exact_match", exact_match, RULES)
