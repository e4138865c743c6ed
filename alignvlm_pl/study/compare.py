"""Arms side by side: scores, and differences from the base arm, with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .plan import Study
from .results import Result, Results, check_order
from .schedule import finished
from .statistics import Estimate, estimate, holm


@dataclass(frozen=True, kw_only=True)
class Row:
    """An arm under one budget.

    Attributes:
        results: By seed; cells that are missing are not in it.
        scores: (dataset, metric) -> mean over questions and seeds.
        differences: (dataset, metric) -> that of the base arm subtracted; none for the base itself.
        adjusted: (dataset, metric) -> p-value of the difference, after Holm over the datasets.
    """

    arm: str
    results: dict[int, Result]
    missing: list[int]
    scores: dict[tuple[str, str], Estimate]
    differences: dict[tuple[str, str], Estimate]
    adjusted: dict[tuple[str, str], float]


def found_results(study: Study, budget: str, results: Results) -> dict[str, dict[int, Result]]:
    """Return the results of a budget that are there, by arm and seed.

    Raises:
        DataError: If arms were trained on other samples, or asked other questions.
    """
    found = finished(study, budget, results)
    everything = [result for by_seed in found.values() for result in by_seed.values()]
    check_order(everything)
    check_questions(everything)
    return found


def check_questions(results: list[Result]) -> None:
    """Raise a DataError where two results have other questions."""
    for result in results[1:]:
        for name in {*results[0]["questions"], *result["questions"]}:
            one, other = (of.get("questions", {}).get(name, {}).get("keys") for of in (results[0], result))
            if one != other:
                raise DataError(
                    f"arms {results[0]['arm']} and {result['arm']}: they answered other questions of {name!r}; test "
                    "both on the same dataset, or remove the result of one and run its cell again"
                )


def compare(study: Study, budget: str, results: Results) -> list[Row]:
    """Return the arms of a budget, in the study's order; an arm without any result has only its missing seeds."""
    found = found_results(study, budget, results)
    return [_row(study, arm, by_seed, found[study.base]) for arm, by_seed in found.items()]


def _row(study: Study, arm: str, own: Mapping[int, Result], base: Mapping[int, Result]) -> Row:
    both = [seed for seed in study.seeds if seed in own and seed in base]
    scores, differences = {}, {}
    for dataset, metric in columns(own):
        documents = next(iter(own.values()))["questions"][dataset]["documents"]
        scores[dataset, metric] = estimate(values(own, list(own), dataset, metric), documents)
        if arm != study.base and both:
            paired = values(own, both, dataset, metric) - values(base, both, dataset, metric)
            differences[dataset, metric] = estimate(paired, documents)
    adjusted: dict[tuple[str, str], float] = {}
    for family in _families(list(differences)):
        adjusted |= holm({pair: differences[pair].p_value for pair in family})
    missing = [seed for seed in study.seeds if seed not in own]
    return Row(arm=arm, results=dict(own), missing=missing, scores=scores, differences=differences, adjusted=adjusted)


def _families(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return the comparisons that are adjusted together: the first metric of all datasets, the second, and so on."""
    ranks: dict[str, int] = {}
    families: dict[int, list[tuple[str, str]]] = {}
    for dataset, metric in pairs:
        ranks[dataset] = ranks.get(dataset, -1) + 1
        families.setdefault(ranks[dataset], []).append((dataset, metric))
    return list(families.values())


def columns(results: Mapping[int, Result]) -> list[tuple[str, str]]:
    """Return the (dataset, metric) pairs that all results have, in their order."""
    pairs = [
        [
            (name, metric)
            for name, one in result["questions"].items()
            for metric in one
            if metric not in ("keys", "documents")
        ]
        for result in results.values()
    ]
    return [pair for pair in pairs[0] if all(pair in other for other in pairs)] if pairs else []


def values(results: Mapping[int, Result], seeds: list[int], dataset: str, metric: str) -> np.ndarray:
    """Return the scores (seeds, questions) of a metric."""
    return np.asarray([results[seed]["questions"][dataset][metric] for seed in seeds], dtype=float)
