"""TabFact on images: is a statement about a table true or false?

References: `docowl` = DocOwl1.5 (mPLUG-DocOwl f91a7685), `docowl_benchmark_evaluate.py` with its ExactAccuracy;
`due` = the DUE path of the same repository, which DocOwl does not use for TabFact.
"""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import without_final_period, without_newlines

RULES = ("docowl", "due")
_VERDICTS = {"true": "1", "false": "0"}


def tabfact(prediction: str, references: Sequence[str], *, rule: str = "docowl") -> float:
    """Return 1 if the prediction equals a reference, else 0.

    Line breaks and outer white space are removed on both sides, a final period from the reference only: neither `True.`
    nor `true` matches `True`. Under `due` the two words match in any case; its scorer raises for any other prediction,
    which scores 0 here. References are `True` or `False` (`1` or `0` in DUE's files).

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("tabfact", rule, RULES)
    text = without_newlines(prediction)
    golds = [without_final_period(without_newlines(reference)) for reference in references]
    if rule == "due":
        verdict = _VERDICTS.get(text.lower())
        return float(any(verdict == _VERDICTS.get(gold.lower(), gold) for gold in golds))
    return float(text in golds)


TABFACT: Metric = mean_metric("tabfact", tabfact, RULES)
