"""Multiple-choice accuracy of MMMU and SEED-Bench, and the open questions of MMMU: short texts and numbers.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/multiple_choice.py` without a judge (open
questions: its `MMMU_preproc`); `vlmevalkit-2025-02` = 282a0afc; `official` = MMMU-Benchmark/MMMU bb0b95a9,
`mmmu/utils/eval_utils.py`; `lmms-eval` = SEED-Bench in lmms-eval 75571cfe. See `option_letters`.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_pl.errors import DataError

from .base import EvalSample, Metric, check_rule, mean_metric
from .option_letters import RULES, Choices, chosen_letter

_OPEN_RULES = ("vlmevalkit", "vlmevalkit-2025-02", "official")

# Phrases before the result in a line of the prediction; in the last line also "=".
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_PUNCTUATION = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

Value = float | str


def mmmu_open(prediction: str, references: Sequence[str], *, rule: str = "vlmevalkit") -> float:
    """Return 1 if the prediction contains an accepted text, else 0.

    By default the question is turned into a choice between the accepted text and anything else (`open_options`), so
    that the text counts anywhere in a short prediction, even inside a longer number. `official` searches phrases after
    cue words. Without references the score is 0.
    """
    check_rule("mmmu_open", rule, _OPEN_RULES)
    if not references:
        return 0.0
    if rule == "official":
        accepted = {form for reference in references for form in _forms(reference)}
        return float(any(_is_accepted(value, accepted) for value in possible_values(prediction)))
    gold = references[0]
    # A reference that looks like an option letter is treated as one.
    right = gold if len(references) == 1 and len(gold) == 1 and gold in string.ascii_uppercase else "A"
    return float(chosen_letter(prediction, open_options(references), rule=rule) == right)


def open_options(references: Sequence[str]) -> dict[str, str]:
    """Return the two options of an open question; several references are written as one Python list."""
    return {"A": references[0] if len(references) == 1 else str(list(references)), "B": "Other Answers"}


def possible_values(reply: str) -> set[Value]:
    """Return the candidates of the official parser: phrases, and numbers in them rounded to 0.01."""
    phrases = _key_phrases(reply)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return {form for text in [*phrases, *numbers] for form in _forms(text)}


def _key_phrases(reply: str) -> list[str]:
    """Return the shortest text after a cue word of each line; the full reply if there is no cue."""
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for cue in (*_CUES, "=") if number == len(lines) else _CUES:
            tail = line.rsplit(cue, 1)[-1].strip()
            if cue in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _PUNCTUATION:
            phrases.append(shortest)
    return phrases or [reply]


def _forms(text: str) -> list[Value]:
    """Return the forms to compare: a rounded number, or lower-case text (a single character with a space beside it)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _is_accepted(value: Value, accepted: set[Value]) -> bool:
    if isinstance(value, str):
        return any(isinstance(form, str) and form in value for form in accepted)
    return value in accepted


def multiple_choice(
    prediction: str, references: Sequence[str], *, choices: Choices | None = None, rule: str = "vlmevalkit"
) -> float:
    """Return 1 if the prediction chooses the correct option, else 0.

    The references are the letter of that option. Without `choices`, letter -> text, the question is an open one, see
    `mmmu_open`, which `lmms-eval` scores as `official`.
    """
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
MMMU_OPEN: Metric = mean_metric("mmmu_open", mmmu_open, _OPEN_RULES)
