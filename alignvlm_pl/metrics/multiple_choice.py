"""Multiple-choice accuracy of MMMU and SEED-Bench.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/multiple_choice.py` without a judge;
`vlmevalkit-2025-02` = 282a0afc; `official` = MMMU-Benchmark/MMMU bb0b95a9, `mmmu/utils/eval_utils.py`; `lmms-eval` =
SEED-Bench in lmms-eval 75571cfe. See `option_letters` and, for MMMU's open questions, `mmmu_open`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_pl.errors import DataError

from .base import EvalSample, Metric, check_rule, mean_metric
from .mmmu_open import mmmu_open
from .option_letters import RULES, Choices, chosen_letter


def multiple_choice(
    prediction: str, references: Sequence[str], *, choices: Choices | None = None, rule: str = "vlmevalkit"
) -> float:
    """Return 1 if the prediction chooses the correct option, else 0.

    The references are the letter of that option. Without `choices`, letter -> text, the question is an open one, see
    `mmmu_open`, which `lmms-eval` scores as `official`.
    """
    check_rule("multiple_choice", rule, RULES)
    if choices:
        return float(chosen_letter(prediction, choices, rule=rule) in references)
    return mmmu_open(prediction, references, rule="official" if rule == "lmms-eval" else rule)


def _choices(sample: EvalSample, rule: str) -> dict[str, Any]:
    choices = sample.meta.get("choices")
    if choices is not None and not (isinstance(choices, Mapping) and all(isinstance(key, str) for key in choices)):
        raise DataError(
            f"multiple_choice: {sample.key!r}: expected letter -> text in meta['choices'], found {choices!r:.60}"
        )
    return {"choices": choices}


MULTIPLE_CHOICE: Metric = mean_metric("multiple_choice", multiple_choice, RULES, headline="accuracy", options=_choices)
