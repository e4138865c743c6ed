"""ANLS, average normalised Levenshtein similarity, of DocVQA and InfographicVQA.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` (`-2025-02`: 282a0afc, the
same); `due` = `due_evaluator/scorers/anls_scorer.py` as DocOwl1.5 (mPLUG-DocOwl f91a7685) calls it;
`docowl-pipeline` = the same after DocOwl's clean-up of both texts; `docowl` = `anls_metric` of its `evaluator.py`;
`lmms-eval` 75571cfe; `st-vqa` = MMF b0ffc7fb, `m4c_evaluators.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from .base import Metric, check_rule, mean_metric
from .text import collapse, without_newlines


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """Normalisations: of the prediction first, of both texts for their distance, and for their length, its divisor."""

    prepare: Callable[[str], str] = str
    clean: Callable[[str], str]
    measured: Callable[[str], str]
    half_counts: bool = True  # whether a similarity equal to the threshold counts


def _stripped_lower(text: str) -> str:
    return text.lower().strip()


_VLMEVALKIT = _Rule(clean=lambda text: collapse(text.lower()), measured=str.upper)
_RULES = {
    "vlmevalkit": _VLMEVALKIT,
    "vlmevalkit-2025-02": _VLMEVALKIT,
    "lmms-eval": _VLMEVALKIT,
    "due": _Rule(clean=str.upper, measured=str.upper, half_counts=False),
    "due-case-sensitive": _Rule(clean=str, measured=str, half_counts=False),
    "docowl": _Rule(clean=str.lower, measured=str.lower, half_counts=False),
    "docowl-pipeline": _Rule(clean=str.upper, measured=str.upper, half_counts=False, prepare=without_newlines),
    "st-vqa": _Rule(clean=_stripped_lower, measured=_stripped_lower),
}


def anls(prediction: str, references: Sequence[str], *, threshold: float = 0.5, rule: str = "vlmevalkit") -> float:
    """Return the similarity to the nearest reference: 1 - Levenshtein distance / length of the longer text.

    By default the distance is that of the lower-cased texts with white space stripped and collapsed, but the length is
    that of the raw texts, as in the reference implementation. Two empty texts are equal (`docowl` and `st-vqa` raise).
    Similarities below the threshold count as 0; so does the threshold itself under the rules of DUE and DocOwl.
    """
    how = _RULES[check_rule("anls", rule, RULES)]
    prediction = how.prepare(prediction)
    # min() before 1 - x, as in the reference implementations, for bit-equal results.
    quotient = min((_distance_share(how, prediction, reference) for reference in references), default=1.0)
    similarity = 1.0 - quotient
    counts = similarity >= threshold if how.half_counts else similarity > threshold
    return similarity if counts else 0.0


def _distance_share(how: _Rule, prediction: str, reference: str) -> float:
    # Upper-casing may lengthen a text (ß becomes SS), and the reference implementations measure that length.
    length = max(len(how.measured(prediction)), len(how.measured(reference)))
    if length == 0:
        return 0.0
    return Levenshtein.distance(how.clean(prediction), how.clean(reference)) / length


RULES = tuple(_RULES)
ANLS: Metric = mean_metric("anls", anls, RULES)
