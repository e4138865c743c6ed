"""Relaxed accuracy of ChartQA: numbers within a tolerance of five per cent.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` (`relaxed_correctness`);
`vlmevalkit-2025-02` = 282a0afc, with prediction and reference swapped, i.e. the tolerance is relative to the
prediction; `docowl` = `evaluator.py` of DocOwl1.5 (mPLUG-DocOwl f91a7685), `docowl-pipeline` = the same after
the clean-up of its `benchmarks_eval.py`; `lmms-eval` 75571cfe.
"""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import without_final_period, without_newlines

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "docowl", "docowl-pipeline", "lmms-eval")


def relaxed_accuracy(
    prediction: str, references: Sequence[str], *, tolerance: float = 0.05, rule: str = "vlmevalkit"
) -> float:
    """Return 1 if the prediction matches a reference, else 0.

    If both are numbers and the reference is not zero, they match if they differ by at most `tolerance` of the
    reference. Otherwise the lower-cased texts must be equal; this includes a reference of zero, and `1,000`, which is
    text.

    By default the prediction is stripped, the references are not.
    """
    check_rule("relaxed_accuracy", rule, RULES)
    if rule in ("vlmevalkit", "vlmevalkit-2025-02"):
        prediction = prediction.strip()
    elif rule == "docowl-pipeline":
        prediction = without_newlines(prediction)
        references = [without_final_period(without_newlines(reference)) for reference in references]
    pairs = [(prediction, reference) for reference in references]
    if rule == "vlmevalkit-2025-02":
        pairs = [(reference, prediction) for reference in references]
    return float(any(_is_right(found, expected, tolerance) for found, expected in pairs))


def _is_right(prediction: str, reference: str, tolerance: float) -> bool:
    found, expected = _number(prediction), _number(reference)
    # No relative tolerance for a reference of 0.
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= tolerance
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    """Return the value of a text that Python parses as a float, per cents as fractions; else None."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


RELAXED_ACCURACY: Metric = mean_metric("relaxed_accuracy", relaxed_accuracy, RULES)
