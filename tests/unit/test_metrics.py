"""Metrics on cases worked out by hand; the original scripts' figures are in tests/parity."""

import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics import (
    METRICS,
    anls,
    character_error_rate,
    exact_match,
    get_metric,
    relaxed_accuracy,
)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("Total", ["total"], 1.0),
        (" 12  May ", ["12 may"], 1.0),
        ("abcd", ["abxx"], 0.5),  # exactly the threshold counts
        ("abc", ["axx"], 0.0),  # one third does not
        ("abcde", ["abcdx", "zzzzz"], 0.8),
        ("abcde", ["zzzzz", "abcdx"], 0.8),
        ("abcd      ", ["abce"], 0.9),  # one edit over the ten characters as written
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("x", [""], 0.0),
        ("x", [], 0.0),
    ],
)
def test_anls(prediction, references, score):
    assert anls(prediction, references) == pytest.approx(score, abs=1e-12)


def test_anls_threshold_is_a_setting():
    assert anls("abc", ["axx"], threshold=0.25) == pytest.approx(1 / 3)
    assert anls("abcd", ["abcx"], threshold=0.8) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("10.5", ["10"], 1),
        ("10.51", ["10"], 0),
        (
            "9.5",
            ["10"],
            1,
        ),  # wrong under the exchanged rule of 2025
        ("-10", ["10"], 0),
        ("14%", ["0.14"], 1),
        ("14", ["14%"], 0),
        ("14%%", ["14%"], 1),
        ("0", ["0.0"], 0),
        ("0%", ["0%"], 1),
        ("3", ["0"], 0),
        ("1,000", ["1000"], 0),
        ("1,000", ["1,000"], 1),
        ("Yes ", ["yes"], 1),
        ("yes.", ["yes"], 0),
        ("yes", ["yes "], 0),  # only the prediction is trimmed
        ("%", ["%"], 1),
        ("nan", ["nan"], 0),
        ("7.", ["7"], 1),
        ("no", ["yes", "no"], 1),
        ("no", [], 0),
    ],
)
def test_relaxed_accuracy(prediction, references, score):
    assert relaxed_accuracy(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("RM 12.50", ["RM 12.50"], 1),
        ("  RM \n 12.50 ", ["RM 12.50"], 1),
        ("rm 12.50", ["RM 12.50"], 0),
        ("RM12.50", ["RM 12.50"], 0),
        ("b", ["a", "b"], 1),
        ("", [""], 1),
        ("", ["a"], 0),
        ("a", [], 0),
    ],
)
def test_exact_match(prediction, references, score):
    assert exact_match(prediction, references) == score


def test_character_error_rate_counts_edits_and_length():
    assert character_error_rate("kitten", "sitting") == (3, 7)
    assert character_error_rate("", "abc") == (3, 3)
    assert character_error_rate("abc", "") == (3, 0)
    assert character_error_rate("TOTAL", "Total") == (4, 5)
    assert character_error_rate("TOTAL", "Total", ignore_case=True) == (0, 5)


def test_registry():
    assert set(METRICS) == {"anls", "exact_match", "relaxed_accuracy"}
    for name, metric in METRICS.items():
        assert get_metric(name) is metric
        assert metric("a", ["a"]) == 1.0
    with pytest.raises(ConfigError, match=r"no metric 'anl'; did you mean 'anls'.*relaxed_accuracy"):
        get_metric("anl")
