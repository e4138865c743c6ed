"""Statistics of a study: paired differences over questions, clustered by document, with seeds as the second level.

The mean over questions varies with the documents that were drawn and with the seeds that were trained. The first part
is measured by a bootstrap over documents (Miller, arXiv 2411.00640, clusters questions likewise), the second by the
spread of the seeds' means, less what documents alone make of it. Intervals take Student's t with Satterthwaite's
degrees of freedom, which few seeds need.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import DataError

Name = TypeVar("Name", bound=Hashable)
DRAWS = 2000
FEWEST_DOCUMENTS = 10
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions and seeds with its 95 % interval.

    Attributes:
        p_value: Two-sided, of a mean of 0.
        error: Standard error.
        documents: Number of clusters.
    """

    mean: float
    low: float
    high: float
    p_value: float
    error: float
    questions: int
    documents: int
    seeds: int


def estimate(values: np.ndarray, documents: Sequence[Hashable], *, draws: int = DRAWS) -> Estimate:
    """Estimate the mean of values (seeds, questions); those of one document are drawn together.

    For differences of two arms, pass the differences of their scores question by question. With one seed the interval
    holds for that seed alone. The bootstrap's random numbers are the same each time.

    Raises:
        DataError: If the questions are of fewer than ten documents, or not as many as the values.
    """
    from scipy import stats

    seeds, questions = values.shape
    if questions != len(documents):
        raise DataError(f"a study's statistics: {questions} questions of {len(documents)} documents' names")
    names, index = np.unique(np.asarray([str(name) for name in documents]), return_inverse=True)
    count = len(names)
    if count < FEWEST_DOCUMENTS:
        raise DataError(
            f"{questions} questions of {count} documents: a bootstrap over documents needs {FEWEST_DOCUMENTS}; "
            "test the arms on more"
        )
    sizes = np.bincount(index, minlength=count)
    sums = np.stack([np.bincount(index, weights=row, minlength=count) for row in values])
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    means = (drawn @ sums.T) / (drawn @ sizes)[:, None]  # (draws, seeds)
    small = count / (count - 1)
    variance = by_document = means.mean(1).var(ddof=1) * small
    terms = by_document**2 / (count - 1)
    if seeds > 1:
        by_seed = values.mean(1).var(ddof=1) / seeds
        # What documents make of the spread of seeds: it is in `by_document` already.
        both = max(means.var(0, ddof=1).mean() * small - by_document, 0.0) / (seeds - 1)
        variance = by_document + max(by_seed - both, 0.0)
        terms += by_seed**2 / (seeds - 1)
    mean, error = float(values.mean()), float(np.sqrt(variance))
    freedom = variance**2 / terms if terms else float(count - 1)
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    reach = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, freedom)) * error
    return Estimate(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        p_value=p_value,
        error=error,
        questions=questions,
        documents=count,
        seeds=seeds,
    )


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Return p-values adjusted for the number of comparisons (Holm 1979)."""
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def smallest_difference(
    *, documents: int, seeds: int, document_sd: float, seed_sd: float, power: float = 0.8, level: float = 0.05
) -> float:
    """Return the smallest true difference that a design detects with this power, two-sided.

    `document_sd` is the standard deviation of a document's paired difference, `seed_sd` that of a seed's mean; with one
    seed it does not count, as in `estimate`.
    """
    from scipy import stats

    by_document, by_seed = document_sd**2 / documents, seed_sd**2 / seeds if seeds > 1 else 0.0
    variance = by_document + by_seed
    terms = by_document**2 / max(documents - 1, 1) + by_seed**2 / max(seeds - 1, 1)
    freedom = variance**2 / terms
    return float((stats.t.ppf(1 - level / 2, freedom) + stats.t.ppf(power, freedom)) * np.sqrt(variance))
