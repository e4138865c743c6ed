"""Character error rate: how well a line of text was read."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from .base import Answer, Metric, Statistics, share


def character_error_rate(prediction: str, reference: str, *, ignore_case: bool = False) -> tuple[int, int]:
    """Count the character edits between a reading and the truth.

    The two counts are returned apart because a corpus is scored as summed edits over summed lengths; a mean
    of rates per line would give short lines too much weight. A rate may exceed 1.

    Args:
        prediction: The text that was read.
        reference: The text that stands there.
        ignore_case: Compare the lower-cased texts.

    Returns:
        Levenshtein distance in code points, and length of the reference as compared.
    """
    if ignore_case:
        prediction, reference = prediction.lower(), reference.lower()
    return Levenshtein.distance(prediction, reference), len(reference)


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    counts = [
        character_error_rate(
            answer.prediction, "".join(answer.references[:1]), ignore_case=rule == "ignore-case"
        )
        for answer in answers
    ]
    return {"edits": sum(edits for edits, _ in counts), "characters": sum(length for _, length in counts)}


def _figures(sums: Statistics) -> dict[str, float]:
    return {"cer": share(sums.get("edits", 0.0), sums.get("characters", 0.0))}


CER = Metric(
    name="cer",
    rules=("ignore-case", "exact-case"),
    statistics=_statistics,
    figures=_figures,
    higher_is_better=False,
)
