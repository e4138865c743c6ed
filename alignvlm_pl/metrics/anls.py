"""ANLS, average normalised Levenshtein similarity: DocVQA, InfographicVQA and our own documents.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` (`-2025-02`: 282a0afc, the
same); `due` = `due_evaluator/scorers/anls_scorer.py` as DocOwl1.5 (mPLUG-DocOwl f91a7685) calls it;
`docowl-pipeline` = the same after DocOwl's clean-up of answers; `docowl` = `anls_metric` of its `evaluator.py`;
`lmms-eval` 75571cfe; `st-vqa` = MMF b0ffc7fb, `m4c_evaluators.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from .base import Metric, check_rule, mean_metric
from .text import collapse, without_newlines


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """How two texts become a similarity.

    Attributes:
        clean: Both texts -> the texts whose distance is taken.
        measured: Both texts -> the texts whose length the distance is divided by.
        half_counts: Whether a similarity of exactly the threshold counts.
        prepare: The prediction alone, before anything else.
    """

    clean: Callable[[str], str]
    measured: Callable[[str], str]
    half_counts: bool = True
    prepare: Callable[[str], str] = str


def _collapsed_lower(text: str) -> str:
    return collapse(text.lower())


def _stripped_lower(text: str) -> str:
    return text.lower().strip()


_VLMEVALKIT = _Rule(clean=_collapsed_lower, measured=str.upper)
_RULES = {
    "vlmevalkit": _VLMEVALKIT,
    "vlmevalkit-2025-02": _VLMEVALKIT,
    "lmms-eval": _VLMEVALKIT,
    "due": _Rule(clean=str.upper, measured=str.upper, half_counts=False),
    "due-case-sensitive": _Rule(clean=str, measured=str, half_counts=False),
    "docowl": _Rule(clean=str.lower, measured=str.lower, half_counts=False),
    "docowl-pipeline": _Rule(
        clean=str.upper, measured=str.upper, half_counts=False, prepare=without_newlines
    ),
    "st-vqa": _Rule(clean=_stripped_lower, measured=_stripped_lower),
}


def anls(
    prediction: str, references: Sequence[str], *, threshold: float = 0.5, rule: str = "vlmevalkit"
) -> float:
    """Similarity to the nearest reference: one minus the Levenshtein distance over the longer length.

    By default the distance is of the lower-cased texts with outer white space removed and inner white space
    collapsed, but the length is that of the *raw* texts, as the original has it. Two texts of no length are
    equal; the references `docowl` and `st-vqa` stop there instead.

    Args:
        prediction: The model's answer.
        references: All accepted answers; without any the score is 0.
        threshold: Similarities below it count as 0; the threshold itself counts, except under the rules of
            DUE and DocOwl.
        rule: Reference that is reproduced.

    Returns:
        0 or a value from `threshold` to 1.

    Raises:
        ConfigError: There is no such rule.
    """
    how = _RULES[check_rule("anls", rule, RULES)]
    prediction = how.prepare(prediction)
    # The originals take the smallest quotient first and only then one minus it; kept, for equal last digits.
    quotient = min((_distance_share(how, prediction, reference) for reference in references), default=1.0)
    similarity = 1.0 - quotient
    counts = similarity >= threshold if how.half_counts else similarity > threshold
    return similarity if counts else 0.0


def _distance_share(how: _Rule, prediction: str, reference: str) -> float:
    # Upper-casing may lengthen a text (a sharp s becomes two letters), and the originals measure that length.
    length = max(len(how.measured(prediction)), len(how.measured(reference)))
    if length == 0:
        return 0.0
    return Levenshtein.distance(how.clean(prediction), how.clean(reference)) / length


RULES = tuple(_RULES)
ANLS: Metric = mean_metric("anls", anls, RULES)
