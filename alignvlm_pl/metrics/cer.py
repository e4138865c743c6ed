"""Character error rate: how well a line of text was read."""

from rapidfuzz.distance import Levenshtein


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
