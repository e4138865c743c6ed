"""Grades of a judge model for open predictions; the judge is a custom function."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.mmvet import Judge, judged_score


def needs_judge(benchmark: Benchmark) -> bool:
    """Whether a benchmark cannot be scored without a judge."""
    return any(scoring.load()[0].needs_judge for scoring in benchmark.scorings)


def load_judge(name: str) -> Judge:
    """Import a judge.

    Args:
        name: ``module:function``. The function takes the row to grade, question | reference | prediction, and a
            temperature, and returns the model's reply, which must parse as a number from 0 to 1.

    Raises:
        ConfigError: There is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        judge: Judge = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"judge {name!r}: expected module:function that can be imported ({error})"
        ) from error
    return judge


def grade(answers: Iterable[EvalSample], judge: Judge) -> list[EvalSample]:
    """Have the judge grade each prediction that has no grade yet; grades go into ``meta["judged"]``."""
    return [
        _graded(answer, judge) if _is_open(answer) and answer.references else answer for answer in answers
    ]


def ungraded(answers: Sequence[EvalSample]) -> int:
    """Number of predictions that have no grade."""
    return sum(map(_is_open, answers))


def _is_open(answer: EvalSample) -> bool:
    return answer.meta.get("judged") is None


def _graded(answer: EvalSample, judge: Judge) -> EvalSample:
    score = judged_score(answer.question, answer.references[0], answer.prediction, judge=judge)
    return replace(answer, meta={**answer.meta, "judged": score})
