"""Grades of a judge model for open predictions; the judge is a custom function."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.mmvet import Judge, judged_score


def needs_judge(benchmark: Benchmark) -> bool:
    """Return whether a benchmark is scored by a judge."""
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
        raise ConfigError(f"judge {name!r}: expected module:function that can be imported ({error})") from error
    return judge


def grade(samples: Iterable[EvalSample], judge: Judge) -> list[EvalSample]:
    """Have the judge grade each prediction that has no grade yet; grades go into ``meta["judged"]``."""
    return [_graded(sample, judge) if _is_open(sample) and sample.references else sample for sample in samples]


def ungraded(samples: Sequence[EvalSample]) -> int:
    """Return the number of predictions without a grade."""
    return sum(map(_is_open, samples))


def _is_open(sample: EvalSample) -> bool:
    return sample.meta.get("judged") is None


def _graded(sample: EvalSample, judge: Judge) -> EvalSample:
    score = judged_score(sample.question, sample.references[0], sample.prediction, judge=judge)
    return replace(sample, meta={**sample.meta, "judged": score})
