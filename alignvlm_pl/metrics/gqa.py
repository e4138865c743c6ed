"""GQA: equality of short answers.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` with method `accuracy`
(`-2025-02`: 282a0afc, the same); `lmms-eval` 75571cfe.
"""

import string
from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "lmms-eval")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> float:
    """1 where the answer equals any reference apart from letter case, else 0.

    Outer white space is ignored on both sides, punctuation and articles count; `lmms-eval` has it the other
    way round: white space counts and ASCII punctuation does not.

    Args:
        prediction: The model's answer.
        references: All accepted answers; GQA has one.
        rule: Reference that is reproduced.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("gqa", rule, RULES)
    if rule == "lmms-eval":
        answer = prediction.lower().translate(_NO_PUNCTUATION)
        return float(any(answer == text.lower().translate(_NO_PUNCTUATION) for text in references))
    answer = prediction.strip().lower()
    return float(any(answer == text.strip().lower() for text in references))


GQA: Metric = mean_metric("gqa", gqa, RULES)
