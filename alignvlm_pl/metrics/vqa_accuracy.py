"""VQA accuracy of TextVQA: agreement with ten human references, 1 if three of them agree.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/vqa_eval.py` with method `vqa_score`;
`vlmevalkit-2025-02` = 282a0afc, which removes the period of `5.`; `official` = the processor of M4C and EvalAI, MMF
b0ffc7fb, `m4c_evaluators.py`; `lmms-eval` 75571cfe, the same.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from .base import Metric, check_rule, mean_metric, share
from .vqa_words import clean_words, clean_words_m4c

_CLEAN: dict[str, Callable[[str], str]] = {
    "vlmevalkit": clean_words,
    "vlmevalkit-2025-02": partial(clean_words, periods_after_digits=False),
    "official": clean_words_m4c,
    "lmms-eval": clean_words_m4c,
}
RULES = tuple(_CLEAN)


def vqa_accuracy(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> float:
    """Return the mean over leave-one-out subsets of min(1, number of agreeing references / 3).

    With ten references 0, 1, 2, 3 and 4 agreements give 0, 0.3, 0.6, 0.9 and 1. A single reference always gives 0.
    `official` raises unless there are ten; here any number is averaged. References are those of all annotators, with
    repetitions.
    """
    clean = _CLEAN[check_rule("vqa_accuracy", rule, RULES)]
    text = clean(prediction)
    agreed = [clean(reference) == text for reference in references]
    agreeing = sum(agreed)
    scores = [min(1.0, (agreeing - left_out) / 3) for left_out in agreed]
    return share(math.fsum(scores), len(scores))


VQA_ACCURACY: Metric = mean_metric("vqa_accuracy", vqa_accuracy, RULES)
