"""GQA: equality of short texts.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` with method `accuracy`
(`-2025-02`: 282a0afc, the same); `lmms-eval` 75571cfe.
"""

import string
from collections.abc import Sequence

from .base import Metric, check_rule, mean_metric

RULES = ("vlmevalkit", "vlmevalkit-2025-02", "lmms-eval")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def gqa(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> float:
    """Return 1 if the prediction equals a reference, ignoring case, else 0.

    White space is stripped on both sides; punctuation and articles count. Under `lmms-eval` white space counts and
    ASCII punctuation does not.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("gqa", rule, RULES)
    found, *accepted = (
        text.lower().translate(_NO_PUNCTUATION) if rule == "lmms-eval" else text.strip().lower()
        for text in (prediction, *references)
    )
    return float(found in accepted)


GQA: Metric = mean_metric("gqa", gqa, RULES)
