"""Relaxed accuracy: ChartQA's metric, numbers within five per cent.

Follows VLMEvalKit, `vlmeval/dataset/utils/vqa_eval.py` (`relaxed_correctness`), as it is now. Its version of
February 2025 had prediction and reference exchanged, i.e. the tolerance was relative to the prediction.
"""

from collections.abc import Sequence


def relaxed_accuracy(prediction: str, references: Sequence[str], *, tolerance: float = 0.05) -> float:
    """1 where the answer is right for any reference, else 0.

    If both texts are numbers and the reference is not zero, the answer is right when it is off by no more
    than `tolerance` of the reference. Otherwise the lower-cased texts must be equal; so a reference of zero
    goes by its spelling, and `1,000` is text.

    Args:
        prediction: The model's answer; outer white space is ignored.
        references: All accepted answers, compared as they are.
        tolerance: Largest deviation as a share of the reference (0-1), inclusive.
    """
    prediction = prediction.strip()
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
