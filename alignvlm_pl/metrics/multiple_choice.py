"""Multiple choice: MMMU and SEED-Bench.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/multiple_choice.py` without a judge;
`vlmevalkit-2025-02` = 282a0afc; `official` = MMMU-Benchmark/MMMU bb0b95a9, `mmmu/utils/eval_utils.py`; `lmms-eval` =
SEED-Bench in lmms-eval 75571cfe. See `option_letters` and, for MMMU's open questions, `mmmu_open`.
"""

from collections.abc import Mapping, Sequence

from alignvlm_pl.errors import DataError

from .base import Answer, Metric, Statistics, check_rule, mean_figures
from .mmmu_open import mmmu_open
from .option_letters import RULES, Choices, chosen_letter


def multiple_choice(
    prediction: str, references: Sequence[str], *, choices: Choices | None = None, rule: str = "vlmevalkit"
) -> float:
    """1 where the reply chooses the right option, else 0.

    Args:
        prediction: The model's reply.
        references: The letter of the right option. Of an open question: its accepted answers.
        choices: Text of each option by its letter; None or empty: the question is open, see `mmmu_open`.
        rule: Reference that is reproduced. SEED-Bench has no open questions: `lmms-eval` scores one as `official`.

    Raises:
        ConfigError: There is no such rule.
    """
    check_rule("multiple_choice", rule, RULES)
    if choices:
        return float(chosen_letter(prediction, choices, rule=rule) in references)
    return mmmu_open(prediction, references, rule="official" if rule == "lmms-eval" else rule)


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    scores = [
        multiple_choice(answer.prediction, answer.references, choices=_choices(answer), rule=rule)
        for answer in answers
    ]
    return {"total": sum(scores), "count": len(scores)}


def _choices(answer: Answer) -> Choices | None:
    choices = answer.meta.get("choices")
    if choices is not None and not (
        isinstance(choices, Mapping) and all(isinstance(key, str) for key in choices)
    ):
        raise DataError(
            f"multiple_choice: {answer.key!r}: expected letter -> text in meta['choices'], found {choices!r:.60}"
        )
    return choices


MULTIPLE_CHOICE = Metric(
    name="multiple_choice", rules=RULES, statistics=_statistics, figures=mean_figures("accuracy")
)
