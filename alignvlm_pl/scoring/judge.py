"""Grades of open predictions by a judge, a function of the user; MM-Vet's metric reads them.

Reference: `judge_row` and `judged_score` follow VLMEvalKit e8e78f05, `vlmeval/dataset/utils/mmvet.py`; its judge is
gpt-4-turbo.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics.base import EvalSample, has_text
from alignvlm_pl.utils.registry import import_path

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
