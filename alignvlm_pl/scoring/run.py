"""Score the predictions of a benchmark under every rule, with bootstrap intervals (no torch here)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from alignvlm_pl.benchmarks import Benchmark
from alignvlm_pl.errors import AlignVLMError, ConfigError, DataError, nearest
from alignvlm_pl.metrics import get_metric
from alignvlm_pl.metrics.base import EvalSample, Metric, Statistics, summed

from .problems import problems_by_reason

RESAMPLES = 1000
_CHUNK = 100  # resamples drawn at once: 100 x 15,000 units are 12 MB
_SEED = 0
_UNKNOWN = "questions without references, not scored"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Scores of one benchmark.

    Attributes:
        samples: Its predictions, in the order given.
        scores: Score of each prediction under every rule: ``metric`` or ``metric@rule``. Predictions that are scored
            together, the fields of a document, share the score of the document.
        metrics: Metric to score, a fraction of 1: ``metric``, ``metric@rule`` and ``metric/group``; the first is the
            headline.
        intervals: Bootstrap 95 % intervals (low, high) of the scores under the default rules.
        num: Scored questions, as the benchmark counts them.
        problems: Why the scores are not those of the whole benchmark; empty where they are.
    """

    benchmark: Benchmark
    samples: list[EvalSample]
    scores: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    num: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def headline(self) -> tuple[str, float]:
        """Name and score of the first metric; nan where there is no prediction."""
        return next(iter(self.metrics.items()), ("", math.nan))

    def headline_under(self, rule: str) -> float | None:
        """Return the headline's score under a rule, or under the default for an empty text; None if it is not known."""
        name = self.headline[0].partition("@")[0]
        return self.metrics.get(f"{name}@{rule}" if rule else name)

    @property
    def rules(self) -> list[str]:
        """Rules of the headline; the default is an empty text."""
        rules = ("", *get_metric(self.benchmark.scorings[0].metric).rules)
        return [rule for rule in rules if self.headline_under(rule) is not None]

    def worst_first(self) -> list[int]:
        """Return the indices of the predictions, worst score of the first metric first; those without one last."""
        sign = 1 if get_metric(self.benchmark.scorings[0].metric).higher_is_better else -1
        first = [sign * next(iter(values.values()), math.inf * sign) for values in self.scores]
        return sorted(range(len(first)), key=first.__getitem__)

    def disagreements(self) -> list[int]:
        """Return the indices of the predictions that rules of one metric score differently."""
        found = []
        for index, values in enumerate(self.scores):
            by_metric: dict[str, set[float]] = {}
            for label, score in values.items():
                by_metric.setdefault(label.split("@")[0], set()).add(score)
            if any(len(different) > 1 for different in by_metric.values()):
                found.append(index)
        return found


def score_samples(
    benchmark: Benchmark,
    samples: Iterable[EvalSample],
    *,
    expected: int | None = None,
    rule: str | None = None,
    resamples: int = RESAMPLES,
    problems: Sequence[str] = (),
    whole: bool = True,
) -> Scored:
    """Score one prediction a question, but for those that are not of the benchmark's split.

    Predictions without references, or that a metric cannot score, are named as a problem, and so is their number where
    they are not the `whole` of the `expected` questions, by default the benchmark's size. Without a rule of its own all
    that the benchmark reports are scored; intervals need `resamples` above 0.

    Raises:
        ConfigError: No metric of the benchmark has the rule, or the predictions lack what it needs, or need a judge.
    """
    belonging = [sample for sample in samples if benchmark.belongs(sample.meta)]
    kept = [sample for sample in belonging if sample.has_reference]
    scores: list[dict[str, float]] = [{} for _ in kept]
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    failures: dict[str, str] = {}  # key -> why its prediction cannot be scored, the first reason
    for metric, rules in _load(benchmark, rule, kept) if kept else ():
        units = metric.units(kept)
        groups = _groups(benchmark, kept, units)
        tables: dict[str, list[Statistics | None]] = {}
        for name in rules:
            tail = "" if name == metric.rules[0] else f"@{name}"
            computed = metric.equal_rules.get(name, name)
            if computed not in tables:
                tables[computed] = [_statistics(metric, kept, unit, computed, failures) for unit in units]
            table = tables[computed]
            for unit, statistics in zip(units, table, strict=True):
                if statistics is not None:
                    for index in unit:
                        scores[index][metric.name + tail] = metric.unit_score(statistics)
            for group, members in groups.items():
                rows = [row for row in map(table.__getitem__, members) if row is not None]
                if not rows:
                    continue
                ending = (f"/{group}" if group else "") + tail
                metrics |= {score + ending: value for score, value in metric.scores(summed(rows)).items()}
                if name == rules[0] and resamples:
                    found = _bootstrap(metric, rows, resamples)
                    intervals |= {score + ending: ends for score, ends in found.items()}
    size = expected or benchmark.size
    num = sum(benchmark.count(sample) for sample, found in zip(kept, scores, strict=True) if found)
    found_scores = iter(scores)
    return Scored(
        benchmark=benchmark,
        samples=belonging,
        scores=[next(found_scores) if sample.has_reference else {} for sample in belonging],
        metrics=metrics,
        intervals=intervals,
        num=num,
        problems=[
            *problems,
            *problems_by_reason({_UNKNOWN: (sample.key for sample in belonging if not sample.has_reference)}),
            *problems_by_reason({"predictions cannot be scored": failures.values()}),
            *([f"{num:,} of {size:,} questions"] if whole and size and num != size else []),
        ],
    )


def _load(
    benchmark: Benchmark, rule: str | None, samples: Sequence[EvalSample]
) -> list[tuple[Metric, tuple[str, ...]]]:
    loaded = [scoring.load() for scoring in benchmark.scorings]
    known = {name for metric, _ in loaded for name in metric.rules}
    if rule is not None and rule not in known:
        raise ConfigError(f"no metric of {benchmark.name} has a rule {rule!r}; {nearest(rule, known)}")
    chosen = []
    for metric, reported in loaded:
        if metric.needs_judge and not any(sample.meta.get("judged") is not None for sample in samples):
            metric.statistics(samples[:1], metric.rules[0])  # raises, and names what is missing
        wanted = [name for name in metric.rules if name == rule] if rule else list(reported)
        usable = tuple(
            name
            for name in wanted
            if name not in metric.needs or any(sample.meta.get(metric.needs[name]) for sample in samples)
        )
        if wanted and not usable:
            raise ConfigError(
                f"rule {rule!r} of {metric.name} needs meta[{metric.needs[wanted[0]]!r}], which no prediction has"
            )
        chosen += [(metric, usable)] if usable else []
    return chosen


def _statistics(
    metric: Metric, samples: Sequence[EvalSample], unit: Sequence[int], rule: str, failures: dict[str, str]
) -> Statistics | None:
    """Return the statistics of one unit; None if the metric cannot score its predictions."""
    rows = [samples[index] for index in unit]
    try:
        need = metric.needs.get(rule)
        if need and not all(row.meta.get(need) for row in rows):
            raise DataError(f"rule {rule} needs meta[{need!r}]")
        for row in rows:
            if metric.needs_judge and row.meta.get("judged") is None:
                raise DataError("has no grade of the judge")
            if not all(isinstance(text, str) for text in row.references):
                raise DataError(f"expected texts as references, found {row.references!r:.60}")
        return metric.statistics(rows, rule)
    except ConfigError:  # a package that is missing, for all predictions alike
        raise
    # The meta of a prediction comes from files: its shape is known only here.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        detail = str(error) if isinstance(error, AlignVLMError) else repr(error)
        for row in rows:
            failures.setdefault(row.key, f"{row.key} ({detail})")
        return None


def _groups(benchmark: Benchmark, samples: Sequence[EvalSample], units: Sequence[list[int]]) -> dict[str, list[int]]:
    groups = {"": list(range(len(units)))}
    for position, unit in enumerate(units):
        group = samples[unit[0]].meta.get(benchmark.groups)
        if group:
            groups.setdefault(str(group), []).append(position)
    return groups


def _bootstrap(metric: Metric, rows: Sequence[Statistics], resamples: int) -> dict[str, tuple[float, float]]:
    """Return score -> 95 % percentile interval over resampled units; the seed is fixed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    chance = np.full(len(rows), 1 / len(rows))
    rng = np.random.default_rng(_SEED)
    drawn: dict[str, list[float]] = {}
    for start in range(0, resamples, _CHUNK):
        counts = rng.multinomial(len(rows), chance, size=min(_CHUNK, resamples - start))
        for sums in counts @ table:
            for score, value in metric.scores(dict(zip(names, sums.tolist(), strict=True))).items():
                drawn.setdefault(score, []).append(value)
    ends = {score: np.percentile(values, [2.5, 97.5]) for score, values in drawn.items()}
    return {score: (float(low), float(high)) for score, (low, high) in ends.items()}
