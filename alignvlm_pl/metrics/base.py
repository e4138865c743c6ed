"""What a metric is: rules, the statistics of one scored unit, and the figures made of their sums."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm_pl.errors import ConfigError, nearest

Statistics = Mapping[str, float]
SampleScore = Callable[..., float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answered question, as metrics see it.

    Keys of `meta` that metrics read:

    - ``choices``: options of a multiple choice question, letter -> text; an open question has none.
    - ``split``: part of TableVQA-Bench: vwtq, vwtq_syn, vtabfact or fintabnetqa.
    - ``category``: names joined by commas: POPE's categories, MM-Vet's capabilities.
    - ``document``: name of the document that a DeepForm or KLC question is about.
    - ``field``: the field that it asks for; without it the question must name it.
    - ``gold``: annotation of that document, ``[{"key": …, "values": [{"value": …, "value_variants": […]}]}]``.
    - ``canonical``: WikiTableQuestions' canonical forms of the references.
    - ``judged``: MM-Vet score from 0 to 1 that the judge gave.

    Attributes:
        key: Name of the sample, unique in its set.
        prediction: The model's answer.
        references: All accepted answers.
        question: The question, without the benchmark's prompt around it.
        meta: What else the benchmark needs.
    """

    key: str
    prediction: str
    references: tuple[str, ...] = ()
    question: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric under all its rules.

    A corpus is scored as `figures(sum of statistics(unit, rule) over all units)`, so the statistics must be
    sufficient: any split of the units over processes gives the same figures, see `summed`.

    Attributes:
        name: Name used in configs, results and TensorBoard tags.
        rules: Names of the references that it can reproduce; the first is the default.
        statistics: (answers of one unit, rule) -> named numbers that may be summed over units.
        figures: Summed statistics -> figures, as fractions of 1; the first one is the headline. A share of
            nothing is 0.
        unit: Answers for which it returns equal values are scored together (the fields of one document); None:
            each alone.
        higher_is_better: Whether larger figures are better ones.
        unit_figure: Figure that scores one unit alone; empty: the headline.
        equal_rules: Rule -> an earlier one that gives the same statistics, so that they are computed once.
        needs: Rule -> key of `meta` without which it cannot be applied.
        needs_judge: Whether answers must be graded first (``meta["judged"]``).
    """

    name: str
    rules: tuple[str, ...]
    statistics: Callable[[Sequence[Answer], str], Statistics]
    figures: Callable[[Statistics], dict[str, float]]
    unit: Callable[[Answer], str] | None = None
    higher_is_better: bool = True
    unit_figure: str = ""
    equal_rules: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    needs_judge: bool = False

    def __call__(self, prediction: str, references: Sequence[str], rule: str | None = None) -> float:
        """Score a single answer of which nothing but its references is known.

        Raises:
            ConfigError: There is no such rule, or the metric needs more than the references.
        """
        answer = Answer(key="", prediction=prediction, references=tuple(references))
        return self.unit_score(self.statistics([answer], self.check_rule(rule)))

    def check_rule(self, rule: str | None) -> str:
        """Return the rule, or the default for None.

        Raises:
            ConfigError: There is no such rule; the message lists those there are.
        """
        return self.rules[0] if rule is None else check_rule(self.name, rule, self.rules)

    def unit_score(self, statistics: Statistics) -> float:
        """Score one unit alone."""
        figures = self.figures(statistics)
        return figures[self.unit_figure or next(iter(figures))]

    def units(self, answers: Sequence[Answer]) -> list[list[int]]:
        """Positions of the answers that are scored together, in order of first appearance."""
        units: dict[object, list[int]] = {}
        for position, answer in enumerate(answers):
            units.setdefault(self.unit(answer) if self.unit else position, []).append(position)
        return list(units.values())

    def evaluate(self, answers: Iterable[Answer], rule: str | None = None) -> dict[str, float]:
        """Score a corpus held in memory.

        Raises:
            ConfigError: There is no such rule, or the answers lack what the metric needs.
        """
        rule, held = self.check_rule(rule), list(answers)
        rows = [self.statistics([held[index] for index in unit], rule) for unit in self.units(held)]
        return self.figures(summed(rows))


def summed(rows: Sequence[Statistics]) -> dict[str, float]:
    """Sum the statistics of units.

    Each sum is rounded once, so that the order of the units, and with it the number of processes, changes nothing.
    """
    addends: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            addends.setdefault(name, []).append(value)
    return {name: math.fsum(values) for name, values in addends.items()}


def check_rule(metric: str, rule: str, rules: Sequence[str]) -> str:
    """Return the rule.

    Raises:
        ConfigError: It is not among those of the metric; the message lists them.
    """
    if rule not in rules:
        raise ConfigError(f"metric {metric!r} has no rule {rule!r}; {nearest(str(rule), rules)}")
    return rule


def share(part: float, whole: float) -> float:
    """Part of a whole; 0 where there is no whole."""
    return part / whole if whole else 0.0


def f1_score(precision: float, recall: float) -> float:
    """Harmonic mean; 0 where both are 0."""
    return share(2 * precision * recall, precision + recall)


def mean_metric(name: str, score: SampleScore, rules: Sequence[str]) -> Metric:
    """Make a metric whose figure is the mean of `score(prediction, references, rule=rule)` over the answers."""

    def statistics(answers: Sequence[Answer], rule: str) -> Statistics:
        scores = [score(answer.prediction, answer.references, rule=rule) for answer in answers]
        return {"total": math.fsum(scores), "count": len(scores)}

    return Metric(name=name, rules=tuple(rules), statistics=statistics, figures=mean_figures(name))


def mean_figures(name: str) -> Callable[[Statistics], dict[str, float]]:
    """Make the figure of a mean out of ``total`` and ``count``."""

    def figures(sums: Statistics) -> dict[str, float]:
        return {name: share(sums.get("total", 0.0), sums.get("count", 0.0))}

    return figures
