"""Grades of a judge model for open predictions; the judge is a custom function."""

from collections.abc import Iterable
from dataclasses import replace

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics.base import EvalSample, has_text
from alignvlm_pl.metrics.mmvet import Judge, judged_score
from alignvlm_pl.utils.registry import import_path


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
