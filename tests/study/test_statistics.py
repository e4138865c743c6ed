"""Intervals and tests of a study against textbook formulas, and their coverage on simulated studies."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from alignvlm_pl.errors import DataError
from alignvlm_pl.study.statistics import estimate, holm, smallest_difference


def names(documents, each=1):
    return [f"d{index}" for index in range(documents) for _ in range(each)]


def test_one_seed_and_one_question_a_document_is_the_t_test():
    values = np.random.default_rng(3).normal(0.1, 0.4, 150)
    found = estimate(values[None], names(150), draws=20_000)
    expected = stats.ttest_1samp(values, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01 * (high - low))
    assert found.p_value == pytest.approx(expected.pvalue, rel=0.05)


def test_questions_of_one_document_are_drawn_together():
    """Clustered standard error of a mean: the deviation of the documents' sums (statsmodels' cov_type cluster)."""
    import statsmodels.api as sm

    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 6, 80)
    index = np.repeat(np.arange(80), sizes)
    values = rng.normal(0, 0.3, 80)[index] + rng.normal(0.2, 0.2, len(index))
    fitted = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": index})
    found = estimate(values[None], [f"d{one}" for one in index], draws=20_000)
    assert found.error == pytest.approx(float(fitted.bse[0]), rel=0.04)
    plain = values.std(ddof=1) / np.sqrt(len(values))
    assert found.error > 1.3 * plain


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(5)
    alike = rng.normal(0.1, 0.3, 200) + rng.normal(0, 0.01, (3, 200))
    apart = alike + np.array([[-0.2], [0.0], [0.2]])
    narrow, wide = (estimate(values, names(200)) for values in (alike, apart))
    assert narrow.mean == pytest.approx(wide.mean)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)
    # With documents that do not matter, three seeds are a t test of three means.
    flat = np.repeat([[0.1], [0.2], [0.4]], 500, axis=1) + rng.normal(0, 1e-6, (3, 500))
    expected = stats.ttest_1samp([0.1, 0.2, 0.4], 0.0)
    assert estimate(flat, names(500)).p_value == pytest.approx(expected.pvalue, rel=0.02)


def coverage(seeds, documents, each, seed_sd, document_sd, question_sd):
    """The share of 2,000 simulated studies, whose true difference is 0, in which the interval holds it."""
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(2000):
        own = np.repeat(rng.normal(0, document_sd, documents), each)
        noise = rng.normal(0, question_sd, (seeds, documents * each))
        found = estimate(rng.normal(0, seed_sd, (seeds, 1)) + own + noise, names(documents, each), draws=200)
        hits += found.low <= 0 <= found.high
    return hits / 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "documents", "each", "seed_sd", "document_sd", "question_sd"),
    [(3, 50, 2, 0.05, 0.3, 0.4), (5, 60, 1, 0.05, 0.3, 0.4), (3, 200, 1, 0.03, 0.2, 0.5), (1, 60, 2, 0.0, 0.3, 0.4)],
)
def test_intervals_cover_as_they_promise(seeds, documents, each, seed_sd, document_sd, question_sd):
    found = coverage(seeds, documents, each, seed_sd, document_sd, question_sd)
    assert found == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
def test_where_three_seeds_do_nothing_the_intervals_are_too_wide_rather_than_too_narrow():
    """Three seeds cannot tell that they do nothing."""
    assert 0.95 <= coverage(3, 100, 1, 0.0, 0.3, 0.4) <= 0.98


def test_where_all_are_equal_there_is_nothing_to_find():
    found = estimate(np.zeros((3, 20)), names(20))
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert estimate(np.ones((3, 20)), names(20)).p_value == 0


def test_the_same_values_give_the_same_interval_each_time():
    values = np.random.default_rng(7).normal(0, 1, (3, 40))
    assert estimate(values, names(40)) == estimate(values, names(40))


def test_too_few_documents_are_named():
    with pytest.raises(DataError, match="18 questions of 9 documents: a bootstrap over documents needs 10"):
        estimate(np.zeros((3, 18)), names(9, 2))


def test_holm_is_statsmodels():
    values = {f"b{index}": p for index, p in enumerate([0.01, 0.04, 0.03, 0.005, 0.5, 0.9])}
    expected = multipletests(list(values.values()), method="holm")[1]
    assert list(holm(values).values()) == pytest.approx(list(expected))
    assert list(holm(values)) == list(values)
    assert holm({"one": 0.03}) == {"one": 0.03}


def test_the_smallest_difference_is_found_with_its_power():
    least = smallest_difference(documents=400, seeds=3, document_sd=0.5, seed_sd=0.0)
    power = TTestPower().power(effect_size=least / 0.5, nobs=400, alpha=0.05)
    assert power == pytest.approx(0.8, abs=0.005)
    with_seeds = smallest_difference(documents=400, seeds=3, document_sd=0.5, seed_sd=0.05)
    assert with_seeds > 1.7 * least
    assert smallest_difference(documents=400, seeds=30, document_sd=0.5, seed_sd=0.05) < with_seeds
