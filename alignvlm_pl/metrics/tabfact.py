"""TabFact on page images: is a statement about a table true or false?

References: `docowl` = DocOwl1.5 (mPLUG-DocOwl f91a7685), `docowl_benchmark_evaluate.py` with its ExactAccuracy;
`due` = the DUE path of the same repository, which DocOwl does not use for TabFact.
"""

from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric
from .text import without_final_period, without_newlines

RULES = ("docowl", "due")
_VERDICTS = {"true": "1", "false": "0"}


def tabfact(prediction: str, references: Sequence[str], *, rule: str = "docowl") -> float:
    """1 where the answer equals any reference to the letter, else 0.

    Line ends and outer white space are deleted on both sides, one final period from the reference only: both
    `True.` and `true` are wrong for `True`. Under `due` the two words count in any letter case; that scorer stops at
    any other answer, here it is wrong.

    Args:
        prediction: The model's answer.
        references: All accepted answers, `True` or `False` (`1` or `0` in DUE's own files).
        rule: Reference that is reproduced.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("tabfact", rule, RULES)
    answer = without_newlines(prediction)
    golds = [without_final_period(without_newlines(reference)) for reference in references]
    if rule == "due":
        verdict = _VERDICTS.get(answer.lower())
        return float(any(verdict == _VERDICTS.get(gold.lower(), gold) for gold in golds))
    return float(answer in golds)


TABFACT: Metric = mean_metric("tabfact", tabfact, RULES)
