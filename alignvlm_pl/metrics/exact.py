"""Exact match: the strictest question-answering score."""

from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer equals any reference, letter case included, else 0.

    Outer white space is ignored and inner white space collapsed to single spaces, on both sides.

    Args:
        prediction: The model's answer.
        references: All accepted answers.
    """
    answer = _collapsed(prediction)
    return float(any(answer == _collapsed(reference) for reference in references))


def _collapsed(text: str) -> str:
    return " ".join(text.split())
