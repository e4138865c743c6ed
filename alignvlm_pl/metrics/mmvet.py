"""MM-Vet: open predictions scored from 0 to 1 by a judge model.

References: `vlmevalkit` = VLMEvalKit e8e78f05, `vlmeval/dataset/utils/mmvet.py` (`-2025-02`: 282a0afc, the same). Its
judge is gpt-4-turbo. Without a judge there is no score.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.utils.registry import import_path

from .base import EvalSample, Metric, Statistics, has_text, share

RULES = ("vlmevalkit", "vlmevalkit-2025-02")
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)

Judge = Callable[[str, float], str]
"""(row to score, temperature) -> reply. The prompt with its scored examples is part of the judge."""


def judge_row(question: str, reference: str, prediction: str) -> str:
    """Return the judge's input row; ``<AND>`` and ``<OR>`` in the reference are surrounded by spaces."""
    reference = reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{question} | {reference} | {prediction} | "


def judged_score(question: str, reference: str, prediction: str, *, judge: Judge) -> float:
    """Query the judge at rising temperatures until it replies with a score from 0 to 1; 0 after five attempts.

    As in the reference implementation, ``nan`` counts as a number and makes the mean nan.
    """
    row = judge_row(question, reference, prediction)
    for temperature in TEMPERATURES:
        score = read_score(judge(row, temperature))
        if score is not None:
            return score
    return 0.0


def read_score(reply: str) -> float | None:
    """Parse the judge's score; None if it is not a number in [0, 1]."""
    try:
        score = float(reply)
    except ValueError:
        return None
    return None if score < 0 or score > 1 else score


def load_judge(name: str) -> Judge:
    """Import a judge by ``module:function``, see `Judge`; its reply must parse as a number from 0 to 1.

    Raises:
        ConfigError: There is no such module or function.
    """
    judge: Judge = import_path(name.replace(":", ".", 1), setting="judge, expected module:function")
    if not callable(judge):
        raise ConfigError(f"judge={name!r} is no function but {type(judge).__name__}; expected module:function")
    return judge


def grade(samples: Iterable[EvalSample], judge: Judge) -> list[EvalSample]:
    """Return the samples with the judge's grade in ``meta["judged"]`` of those that have none."""
    graded = []
    for sample in samples:
        if sample.meta.get("judged") is None and has_text(sample.references):
            score = judged_score(sample.question, sample.references[0], sample.prediction, judge=judge)
            sample = replace(sample, meta={**sample.meta, "judged": score})
        graded.append(sample)
    return graded


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    values_by_name: dict[str, list[float]] = {}
    for sample in samples:
        score = _judged(sample)
        capabilities = [name.strip() for name in str(sample.meta.get("category", "")).split(",")]
        # The reference implementation keeps capabilities and their combinations in one table, so a question with a
        # single capability counts twice in that capability's score.
        for name in ("score", *(name for name in CAPABILITIES if name in capabilities), "_".join(capabilities)):
            values_by_name.setdefault(name, []).append(score)
    totals = {f"total/{name}": math.fsum(values) for name, values in values_by_name.items()}
    return totals | {f"count/{name}": float(len(values)) for name, values in values_by_name.items()}


def _judged(sample: EvalSample) -> float:
    judged = sample.meta.get("judged")
    if judged is None:
        raise ConfigError(
            f"mmvet: {sample.key!r} has no score of a judge; expected meta['judged'] from 0 to 1. MM-Vet is scored "
            "by a judge model only: leave the benchmark out, or add the judge's scores"
        )
    if isinstance(judged, bool) or not isinstance(judged, int | float) or judged < 0 or judged > 1:
        raise DataError(f"mmvet: {sample.key!r}: expected a score from 0 to 1 in meta['judged'], found {judged!r:.60}")
    return float(judged)


def _scores(sums: Statistics) -> dict[str, float]:
    found = sorted(name.removeprefix("count/") for name in sums if name.startswith("count/"))
    names = dict.fromkeys(["score", *(name for name in CAPABILITIES if name in found), *found])
    return {name: share(sums.get(f"total/{name}", 0.0), sums.get(f"count/{name}", 0.0)) for name in names}


MMVET = Metric(
    name="mmvet",
    rules=RULES,
    statistics=_statistics,
    scores=_scores,
    equal_rules={RULES[1]: RULES[0]},
    needs_judge=True,
)
