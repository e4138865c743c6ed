"""Equality of short texts: exact match, GQA, TabFact, and ChartQA with numbers within a tolerance of five per cent.

References: of `exact_match` there is none. GQA: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py`
with method `accuracy` (`-2025-02`: 282a0afc, the same); `lmms-eval` 75571cfe. TabFact: `docowl` = DocOwl1.5
(mPLUG-DocOwl f91a7685), `docowl_benchmark_evaluate.py` with its ExactAccuracy; `due` = the DUE path of the same
repository, which DocOwl does not use for TabFact. ChartQA: `vlmevalkit` = `relaxed_correctness` of the file above;
`-2025-02` with prediction and reference swapped, i.e. the tolerance is relative to the prediction; `docowl` =
`evaluator.py` of DocOwl1.5, `docowl-pipeline` = the same after the clean-up of its `benchmarks_eval.py`; `lmms-eval`.
"""

import string
from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import collapse, without_final_period, without_newlines

_RULES = {
    "exact_match": ("exact",),
    "gqa": ("vlmevalkit", "vlmevalkit-2025-02", "lmms-eval"),
    "tabfact": ("docowl", "due"),
    "relaxed_accuracy": ("vlmevalkit", "vlmevalkit-2025-02", "docowl", "docowl-pipeline", "lmms-eval"),
}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VERDICTS = {"true": "1", "false": "0"}


def exact_match(prediction: str, references: Sequence[str], *, rule: str = "exact") -> float:
    """Return 1 if the prediction equals a reference once white space is stripped and collapsed, else 0; case counts."""
    check_rule("exact_match", rule, _RULES["exact_match"])
    text = collapse(prediction)
    return float(any(text == collapse(reference) for reference in references))


def gqa(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> float:
    """Return 1 if the prediction equals a reference, ignoring case, else 0.

    White space is stripped on both sides; punctuation and articles count. Under `lmms-eval` white space counts and
    ASCII punctuation does not.
    """
    check_rule("gqa", rule, _RULES["gqa"])
    found, *accepted = (
        text.lower().translate(_NO_PUNCTUATION) if rule == "lmms-eval" else text.strip().lower()
        for text in (prediction, *references)
    )
    return float(found in accepted)


def tabfact(prediction: str, references: Sequence[str], *, rule: str = "docowl") -> float:
    """Return 1 if the prediction equals a reference, `True` or `False` (`1` or `0` in DUE's files), else 0.

    Line breaks and outer white space are removed on both sides, a final period from the reference only: neither `True.`
    nor `true` matches `True`. Under `due` the two words match in any case; its scorer raises for any other prediction,
    which scores 0 here.
    """
    check_rule("tabfact", rule, _RULES["tabfact"])
    text = without_newlines(prediction)
    golds = [without_final_period(without_newlines(reference)) for reference in references]
    if rule == "due":
        verdict = _VERDICTS.get(text.lower())
        return float(any(verdict == _VERDICTS.get(gold.lower(), gold) for gold in golds))
    return float(text in golds)


def relaxed_accuracy(
    prediction: str, references: Sequence[str], *, tolerance: float = 0.05, rule: str = "vlmevalkit"
) -> float:
    """Return 1 if the prediction matches a reference, else 0.

    If both are numbers and the reference is not zero, they match if they differ by at most `tolerance` of the
    reference. Otherwise the lower-cased texts must be equal; this includes a reference of zero, and `1,000`, which is
    text.

    By default the prediction is stripped, the references are not.
    """
    check_rule("relaxed_accuracy", rule, _RULES["relaxed_accuracy"])
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


EXACT_MATCH: Metric = mean_metric("exact_match", exact_match, _RULES["exact_match"])
GQA: Metric = mean_metric("gqa", gqa, _RULES["gqa"])
TABFACT: Metric = mean_metric("tabfact", tabfact, _RULES["tabfact"])
RELAXED_ACCURACY: Metric = mean_metric("relaxed_accuracy", relaxed_accuracy, _RULES["relaxed_accuracy"])
