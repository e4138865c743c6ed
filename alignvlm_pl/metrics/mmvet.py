"""MM-Vet: open answers that a judge model grades from 0 to 1.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/mmvet.py` (`-2025-02`: 282a0afc, the same). Its
judge is gpt-4-turbo. Without a judge there is no score: a guess would not be comparable with anything.
"""

import math
from collections.abc import Callable, Sequence

from alignvlm_pl.errors import ConfigError, DataError

from .base import Answer, Metric, Statistics, share

RULES = ("vlmevalkit", "vlmevalkit-2025-02")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)

Judge = Callable[[str, float], str]
"""(row to be graded, temperature) -> reply. What stands around the row, the graded examples, is the judge's."""


def judge_row(question: str, reference: str, prediction: str) -> str:
    """Make the row that is put before the judge: question, gold answer, prediction.

    ``<AND>`` and ``<OR>`` in the gold answer get blanks around them.
    """
    reference = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{question} | {reference} | {prediction} | "


def judged_score(question: str, reference: str, prediction: str, *, judge: Judge) -> float:
    """Ask the judge for a score from 0 to 1, at rising temperatures until its reply is one; 0 after five tries.

    ``nan`` passes for a number, as in the reference, and makes the mean nan as well.
    """
    row = judge_row(question, reference, prediction)
    for temperature in TEMPERATURES:
        score = read_score(judge(row, temperature))
        if score is not None:
            return score
    return 0.0


def read_score(reply: str) -> float | None:
    """The number that the judge's reply is; None where it is none, or below 0 or above 1."""
    try:
        score = float(reply)
    except ValueError:
        return None
    return None if score < 0 or score > 1 else score


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    grades: dict[str, list[float]] = {}
    for answer in answers:
        grade = _judged(answer)
        capabilities = [name.strip() for name in str(answer.meta.get("category", "")).split(",")]
        # The reference keeps capabilities and their combinations in one table, so that a question with a single
        # capability counts twice in the figure of that capability.
        for name in (
            "score",
            *(name for name in CAPABILITIES if name in capabilities),
            "_".join(capabilities),
        ):
            grades.setdefault(name, []).append(grade)
    totals = {f"total/{name}": math.fsum(values) for name, values in grades.items()}
    return totals | {f"count/{name}": float(len(values)) for name, values in grades.items()}


def _judged(answer: Answer) -> float:
    judged = answer.meta.get("judged")
    if judged is None:
        raise ConfigError(
            f"mmvet: {answer.key!r} has no score of a judge; expected meta['judged'] from 0 to 1. MM-Vet is scored "
            "by a judge model alone: leave the benchmark out, or add the judge's scores"
        )
    if isinstance(judged, bool) or not isinstance(judged, int | float) or judged < 0 or judged > 1:
        raise DataError(
            f"mmvet: {answer.key!r}: expected a grade from 0 to 1 in meta['judged'], found {judged!r:.60}"
        )
    return float(judged)


def _figures(sums: Statistics) -> dict[str, float]:
    """The mean over all questions, of each capability, and of each combination of capabilities."""
    names = sorted(name.removeprefix("count/") for name in sums if name.startswith("count/"))
    first = ["score", *(name for name in CAPABILITIES if name in names)]
    return {
        name: share(sums.get(f"total/{name}", 0.0), sums.get(f"count/{name}", 0.0))
        for name in dict.fromkeys(first + names)
    }


MMVET = Metric(
    name="mmvet",
    rules=RULES,
    statistics=_statistics,
    figures=_figures,
    equal_rules={RULES[1]: RULES[0]},
    needs_judge=True,
)
