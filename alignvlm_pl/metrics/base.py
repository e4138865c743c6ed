"""The `Metric` type: rules, statistics of one scored unit, and scores computed from their sums."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm_pl.errors import require_known

Statistics = Mapping[str, float]
SampleScore = Callable[..., float]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSample:
    """One sample to score, with prediction and references: the input of a metric.

    Keys of `meta` that metrics read:

    - ``choices``: options of a multiple-choice question, letter -> text; missing for an open question.
    - ``split``: part of TableVQA-Bench: vwtq, vwtq_syn, vtabfact or fintabnetqa.
    - ``category``: comma-separated names: POPE's categories, MM-Vet's capabilities.
    - ``document``: name of the document of a DeepForm or KLC question.
    - ``field``: the field that the question asks for; if missing, the question must name it.
    - ``gold``: annotation of that document, ``[{"key": …, "values": [{"value": …, "value_variants": […]}]}]``.
    - ``canonical``: WikiTableQuestions' canonical forms of the references.
    - ``judged``: the judge's MM-Vet score, from 0 to 1.

    `key` is unique in the dataset; `question` is without the benchmark's prompt.
    """

    key: str
    prediction: str
    references: tuple[str, ...] = ()
    question: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether there is anything to score the prediction against: a reference, an annotation or a grade."""
        return has_text(self.references) or any(self.meta.get(name) is not None for name in ("gold", "judged"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A metric under all its rules.

    A dataset is scored as `scores(sum over units of statistics(unit, rule))`. The statistics must be sufficient, so
    that scores do not depend on the split of units over processes; see `summed`.

    Attributes:
        rules: Names of the reference implementations that it reproduces; the first is the default.
        statistics: (predictions of one unit, rule) -> named numbers that are summed over units.
        scores: Summed statistics -> named scores in [0, 1]; the first is the headline. A share of nothing is 0.
        unit: Predictions with equal values are scored together (the fields of one document); None: each by itself.
        unit_key: Name of the score of a single unit; empty: the headline.
        equal_rules: Rule -> an earlier rule with the same statistics, which are then computed once.
        needs: Rule -> required key of `meta`.
        needs_judge: Whether a judge model must have scored the predictions (``meta["judged"]``).
    """

    name: str
    rules: tuple[str, ...]
    statistics: Callable[[Sequence[EvalSample], str], Statistics]
    scores: Callable[[Statistics], dict[str, float]]
    unit: Callable[[EvalSample], str] | None = None
    higher_is_better: bool = True
    unit_key: str = ""
    equal_rules: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    needs_judge: bool = False

    def __call__(self, prediction: str, references: Sequence[str], rule: str | None = None) -> float:
        """Return the score of a single prediction without `meta`; a ConfigError if the metric needs more."""
        sample = EvalSample(key="", prediction=prediction, references=tuple(references))
        return self.unit_score(self.statistics([sample], self.check_rule(rule)))

    def check_rule(self, rule: str | None) -> str:
        """Return the rule, or the default for None."""
        return self.rules[0] if rule is None else check_rule(self.name, rule, self.rules)

    def unit_score(self, statistics: Statistics) -> float:
        """Return the score of one unit from its statistics."""
        scores = self.scores(statistics)
        return scores[self.unit_key or next(iter(scores))]

    def units(self, samples: Sequence[EvalSample]) -> list[list[int]]:
        """Group predictions into units: lists of indices, in order of first appearance."""
        units: dict[object, list[int]] = {}
        for position, sample in enumerate(samples):
            units.setdefault(self.unit(sample) if self.unit else position, []).append(position)
        return list(units.values())

    def evaluate(self, samples: Iterable[EvalSample], rule: str | None = None) -> dict[str, float]:
        """Score a dataset in memory, name -> score; a ConfigError if required keys of `meta` are missing."""
        rule, all_samples = self.check_rule(rule), list(samples)
        rows = [self.statistics([all_samples[index] for index in unit], rule) for unit in self.units(all_samples)]
        return self.scores(summed(rows))


def has_text(references: Iterable[object]) -> bool:
    """Return whether a list of references has one that is not blank."""
    return any(str(reference).strip() for reference in references)


def summed(rows: Sequence[Statistics]) -> dict[str, float]:
    """Sum the statistics of units, each sum rounded once: independent of order and number of processes."""
    addends: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            addends.setdefault(name, []).append(value)
    return {name: math.fsum(values) for name, values in addends.items()}


def check_rule(metric: str, rule: str, rules: Sequence[str]) -> str:
    """Return the rule; raise ConfigError, with the known ones, if there is none of this name."""
    require_known(rule, rules, f"metric {metric!r} has no rule {rule!r}")
    return rule


def share(part: float, total: float) -> float:
    """Return part / total; 0 if the total is 0."""
    return part / total if total else 0.0


def f1_score(precision: float, recall: float) -> float:
    """Return the harmonic mean; 0 if both are 0."""
    return share(2 * precision * recall, precision + recall)


def mean_metric(
    name: str,
    score: SampleScore,
    rules: Sequence[str],
    *,
    headline: str = "",
    options: Callable[[EvalSample, str], dict[str, Any]] = lambda sample, rule: {},
    needs: Mapping[str, str] | None = None,
) -> Metric:
    """Return a metric that is the mean of `score(prediction, references, rule=rule, **options(sample, rule))`.

    `headline` is the name of the score, where it is not the metric's; `needs` as in `Metric`.
    """

    def statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
        values = [score(one.prediction, one.references, rule=rule, **options(one, rule)) for one in samples]
        return {"total": math.fsum(values), "count": len(values)}

    def scores(sums: Statistics) -> dict[str, float]:
        return {headline or name: share(sums.get("total", 0.0), sums.get("count", 0.0))}

    return Metric(name=name, rules=tuple(rules), statistics=statistics, scores=scores, needs=needs or {})
