"""ANLS, average normalised Levenshtein similarity: DocVQA, InfographicVQA and our own documents.

Follows VLMEvalKit, `vlmeval/dataset/utils/vqa_eval.py` (`anls_compute`, `hit_calculate`), the framework that
the paper names; the DUE and DocOwl variants differ and are not this one.
"""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def anls(prediction: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Similarity to the nearest reference.

    Distances are of the lower-cased texts with outer white space removed and inner white space collapsed, but
    they are divided by the longer of the two *raw* texts, as the original does.

    Args:
        prediction: The model's answer.
        references: All accepted answers; without any the score is 0.
        threshold: Similarities below it count as 0; the threshold itself counts.

    Returns:
        0 or a value from `threshold` to 1.
    """
    # The original takes the smallest quotient first and only then one minus it; kept, for equal last digits.
    quotient = min((_distance_share(prediction, reference) for reference in references), default=1.0)
    similarity = 1.0 - quotient
    return 0.0 if similarity < threshold else similarity


def _distance_share(prediction: str, reference: str) -> float:
    # Upper-casing may lengthen a text (a sharp s becomes two letters), and the original measures that length.
    length = max(len(prediction.upper()), len(reference.upper()))
    if length == 0:
        return 0.0
    return Levenshtein.distance(_plain(prediction), _plain(reference)) / length


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
