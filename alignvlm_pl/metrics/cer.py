"""Character error rate (CER) of transcribed text lines."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from .base import EvalSample, Metric, Statistics, share


def character_error_rate(prediction: str, reference: str, *, ignore_case: bool = False) -> tuple[int, int]:
    """Return Levenshtein distance and length of the reference, in code points.

    A dataset is scored as summed edits over summed lengths, which may exceed 1; a mean would overweight short lines.
    """
    if ignore_case:
        prediction, reference = prediction.lower(), reference.lower()
    return Levenshtein.distance(prediction, reference), len(reference)


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    pairs = [(sample.prediction, "".join(sample.references[:1])) for sample in samples]
    counts = [character_error_rate(*pair, ignore_case=rule == "ignore-case") for pair in pairs]
    return {"edits": sum(edits for edits, _ in counts), "characters": sum(length for _, length in counts)}


def _scores(sums: Statistics) -> dict[str, float]:
    return {"cer": share(sums.get("edits", 0.0), sums.get("characters", 0.0))}


RULES = ("ignore-case", "exact-case")
CER = Metric(name="cer", rules=RULES, statistics=_statistics, scores=_scores, higher_is_better=False)
