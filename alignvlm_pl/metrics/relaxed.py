"""Relaxed accuracy: ChartQA's metric, numbers within five per cent.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` (`relaxed_correctness`);
`vlmevalkit-2025-02` = 282a0afc, which had prediction and reference exchanged, i.e. the tolerance was relative to
the prediction; `docowl` = `evaluator.py` of DocOwl1.5 (mPLUG-DocOwl f91a7685), `docowl-pipeline` = the same after
the clean-up of its `benchmarks_eval.py`; `lmms-eval` 75571cfe.
"""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import without_final_period, without_newlines

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "docowl", "docowl-pipeline", "lmms-eval")
_TRIMMED = ("vlmevalkit", "vlmevalkit-2025-02")


def relaxed_accuracy(
    prediction: str, references: Sequence[str], *, tolerance: float = 0.05, rule: str = "vlmevalkit"
) -> float:
    """1 where the answer is right for any reference, else 0.

    If both texts are numbers and the reference is not zero, the answer is right when it is off by no more
    than `tolerance` of the reference. Otherwise the lower-cased texts must be equal; so a reference of zero
    goes by its spelling, and `1,000` is text.

    Args:
        prediction: The model's answer; outer white space is ignored by default.
        references: All accepted answers, compared as they are by default.
        tolerance: Largest deviation as a share of the reference (0-1), inclusive.
        rule: Reference that is reproduced.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("relaxed_accuracy", rule, RULES)
    if rule in _TRIMMED:
        prediction = prediction.strip()
    elif rule == "docowl-pipeline":
        prediction = without_newlines(prediction)
        references = [without_final_period(without_newlines(reference)) for reference in references]
    if rule == "vlmevalkit-2025-02":
        return float(any(_is_right(reference, prediction, tolerance) for reference in references))
    return float(any(_is_right(prediction, reference, tolerance) for reference in references))


def _is_right(prediction: str, reference: str, tolerance: float) -> bool:
    found, expected = _number(prediction), _number(reference)
    # A reference of 0 has no five per cent.
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= tolerance
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    """The value of a text, per cents as fractions; whatever Python reads as a float is a number."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


RELAXED_ACCURACY: Metric = mean_metric("relaxed_accuracy", relaxed_accuracy, RULES)
