"""Metrics on cases worked out by hand and by properties; those of the reference implementations are in tests/parity."""

import math
import random

import pytest

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.metrics import METRICS, EvalSample, get_metric
from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.metrics.cer import character_error_rate
from alignvlm_pl.metrics.exact import exact_match, relaxed_accuracy
from alignvlm_pl.metrics.multiple_choice import mmmu_open, multiple_choice
from alignvlm_pl.metrics.option_letters import chosen_letter
from alignvlm_pl.metrics.tablevqa import tablevqa
from alignvlm_pl.metrics.vcr import vcr
from alignvlm_pl.metrics.vlmevalkit_tables import read_references, reload_predictions
from alignvlm_pl.metrics.vqa_words import clean_words
from alignvlm_pl.metrics.wtq import wtq
from alignvlm_pl.scoring.judge import judged_score

GOLD = [
    {"key": "advertiser", "values": [{"value": "ACME", "value_variants": ["ACME", "Acme Inc."]}]},
    {"key": "gross_amount", "values": [{"value": "10"}]},
]


def _sample(number: int, rng: random.Random) -> EvalSample:
    """A sample that every metric can score."""
    field = ("advertiser", "gross_amount")[number % 2]
    return EvalSample(
        key=f"k{number:03}",
        prediction=rng.choice(["yes", "no", "A", "10", "acme inc.", "none of it", "", "10.2", "true", "ab cd"]),
        references=(rng.choice(["Yes", "No", "A", "10", "ab cd", "1"]),),
        question=f"What is the value for the {field}?",
        meta={
            "split": rng.choice(["vwtq", "vwtq_syn", "vtabfact", "fintabnetqa"]),
            "category": rng.choice(["rec,ocr", "rec", "math"]),
            "choices": {"A": "ab", "B": "cd"},
            "document": f"d{number // 2}",
            "gold": GOLD,
            "judged": rng.choice([0.0, 0.1, 0.7, 1.0]),
        },
    )


SAMPLES = [_sample(number, random.Random(number)) for number in range(60)]


@pytest.mark.parametrize("name", METRICS)
def test_any_split_and_order_gives_the_same_scores(name):
    metric, rng = METRICS[name], random.Random(1)
    units: dict = {}
    for sample in SAMPLES:
        units.setdefault(metric.unit(sample) if metric.unit else sample.key, []).append(sample)
    for rule in metric.rules:
        expected = metric.evaluate(SAMPLES, rule)
        assert name == "cer" or all(0 <= value <= 1 for value in expected.values())
        shuffled = rng.sample(SAMPLES, len(SAMPLES))
        assert metric.evaluate(shuffled, rule) == expected
        rows = [metric.statistics(unit, rule) for unit in rng.sample(list(units.values()), len(units))]
        sums = {key: math.fsum(row.get(key, 0.0) for row in rows) for key in {key for row in rows for key in row}}
        assert metric.scores(sums) == expected
        assert next(iter(metric.scores(sums))) == next(iter(expected))


@pytest.mark.parametrize("name", METRICS)
def test_rules_are_listed(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.check_rule(None) == metric.rules[0]
    with pytest.raises(ConfigError, match=rf"'{name}' has no rule 'vlmeval'.*known: .*{metric.rules[0]}"):
        metric.evaluate(SAMPLES, "vlmeval")


@pytest.mark.parametrize("name", METRICS)
def test_without_references_or_predictions(name):
    metric = METRICS[name]
    assert next(iter(metric.scores({}).values())) == 0
    bare = [EvalSample(key=a.key, prediction="x", question=a.question, meta=a.meta) for a in SAMPLES]
    if name not in ("document_f1", "mmvet"):  # their gold is elsewhere
        for rule in metric.rules:
            assert next(iter(metric.evaluate(bare, rule).values())) == 0


def test_registry():
    with pytest.raises(ConfigError, match=r"no metric 'anl'; did you mean 'anls'.*relaxed_accuracy"):
        get_metric("anl")
    assert get_metric("anls")("abcd", ["abxx"]) == 0.5
    assert get_metric("anls")("abcd", ["abxx"], "due") == 0
    assert get_metric("pope")("yes.", ["Yes"]) == 1


def test_pure_functions_refuse_an_unknown_rule_too():
    for score in (anls, exact_match, relaxed_accuracy, wtq, multiple_choice):
        with pytest.raises(ConfigError, match=r"has no rule 'du'"):
            score("a", ["a"], rule="du")


def test_mmvet_is_refused_without_a_judge():
    sample = EvalSample(key="q7", prediction="a", meta={"category": "ocr"})
    with pytest.raises(ConfigError, match=r"'q7' has no score of a judge.*leave the benchmark out"):
        METRICS["mmvet"].evaluate([sample])


def test_judge_is_asked_until_it_gives_a_number():
    replies = {0.0: "about 0.5", 0.5: "1.5", 1.0: " 0.4\n"}
    assert judged_score("q", "a<OR>b", "c", judge=lambda row, temperature: replies[temperature]) == 0.4
    assert judged_score("q", "a", "c", judge=lambda row, temperature: "no idea") == 0.0


def test_documents_need_their_annotation():
    metric = METRICS["document_f1"]
    question = "What is the value for the advertiser?"
    with pytest.raises(DataError, match=r"'k' names no document"):
        metric.evaluate([EvalSample(key="k", prediction="a", question=question)])
    with pytest.raises(DataError, match=r"'k' has no annotation"):
        metric.evaluate([EvalSample(key="k", prediction="a", question=question, meta={"document": "d"})])
    meta = {"document": "d", "gold": GOLD}
    with pytest.raises(DataError, match=r"names none of the fields advertiser"):
        metric.evaluate([EvalSample(key="k", prediction="a", question="Total?", meta=meta)])


def test_document_f1_of_one_document():
    meta = {"document": "d", "gold": GOLD}
    questions = {"advertiser": " acme\n INC.", "gross_amount": "None"}
    samples = [
        EvalSample(key=field, prediction=text, question=f"What is the value for the {field}?", meta=meta)
        for field, text in questions.items()
    ]
    scores = METRICS["document_f1"].evaluate(samples)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (1.0, 0.5, 2 / 3)
    # Without DocOwl's clean-up the line end stays, and None is a wrong value.
    assert METRICS["document_f1"].evaluate(samples, "due")["f1"] == 0


def test_tablevqa_is_the_mean_of_its_parts_not_of_its_questions():
    def sample(number, split, prediction):
        return EvalSample(key=str(number), prediction=prediction, references=("1",), meta={"split": split})

    samples = [sample(n, "vwtq", "1") for n in range(3)] + [sample(3, "vtabfact", "false")]
    assert METRICS["tablevqa"].evaluate(samples) == {"mean": 0.5, "vwtq": 1.0, "vtabfact": 0.0}
    with pytest.raises(DataError, match=r"no part 'vwtg'; did you mean 'vwtq'"):
        METRICS["tablevqa"].evaluate([sample(0, "vwtg", "1")])


def test_anls_threshold_is_a_setting():
    assert anls("abc", ["axx"], threshold=0.25) == pytest.approx(1 / 3)
    assert anls("abcd", ["abcx"], threshold=0.8) == 0.0


def test_wtq_canonical_forms_belong_to_references():
    assert wtq("1000", ["1,000"], rule="official-canonical", canonical=["1000.0"]) == 1
    assert wtq("b\ta", ["a", "b"], rule="official") == 1
    assert wtq("9" * 400, ["8" * 400]) == 0  # more digits than a float holds
    with pytest.raises(DataError, match=r"1 references .*2 canonical"):
        wtq("1", ["1"], rule="official-canonical", canonical=["1", "2"])


def test_due_compares_in_upper_case():
    # A sharp s becomes two letters only in upper case.
    assert wtq("STRASSE", ["Straße"]) == 1
    assert wtq("STRASSE", ["Straße"], rule="official") == 0


def test_only_the_first_32_periods_go():
    assert clean_words("a" + 33 * "." + "b") == "a.b"


def test_vcr_reads_what_follows_the_last_role():
    found = vcr("Assistant: one two Assistant: three", ["one two", "three"])
    assert [blank.exact_match for blank in found] == [0, 1]


def test_a_letter_counts_among_the_last_four_words():
    choices = {"A": "left", "B": "right"}
    assert chosen_letter("say B as we do", choices) == "B"
    assert chosen_letter("say B as we always do", choices) == "Z"
    assert chosen_letter("say B as we always do", choices, rule="vlmevalkit-2025-02") == "B"


@pytest.mark.parametrize(
    ("reply", "choices", "letter"),
    [
        ("answer is dog", {"A": "a cat", "B": "dog"}, "B"),  # there is no D: the text decides
        ("answer is dog", {"A": "cat", "B": "dog"}, "Z"),  # and is not searched in a long reply
        (
            "answer is dog, so answer is <B>",
            {"A": "cat", "B": "xyz" * 9},
            "Z",
        ),  # the first hit alone is tried
        ("answer is B. (A) and C were near", {"A": "cat", "B": "x", "C": "y"}, "B"),
        # Refusals are whole sentences: parts of them are none.
        ("Sorry, I can't help with images of people yet. B", {"A": "x", "B": "y"}, "Z"),
        ("We cannot help with images of people yet: B", {"A": "x", "B": "y"}, "B"),
        ("I can't process this file: B", {"A": "x", "B": "y"}, "B"),
        ("I can't process this file. B", {"A": "x", "B": "y"}, "Z"),
        ("so sorry, but without the image provided, B", {"A": "x", "B": "y"}, "B"),
        ("I'm sorry, but without the image provided, B", {"A": "x", "B": "y"}, "Z"),
        ("Cannot determine the answer B", {"A": "x", "B": "y"}, "Z"),
        # Where nothing came back no letter is looked for, but texts are.
        ("Failed to obtain answer via API. B", {"A": "x", "B": "a long option text"}, "Z"),
        ("Failed to obtain answer via API. The answer is B", {"A": "x" * 40, "B": "y"}, "Z"),
        ("Failed to obtain answer via API. B", {"A": "x" * 40, "B": "api"}, "B"),
    ],
)
def test_letters_as_the_toolkit_finds_them(reply, choices, letter):
    assert chosen_letter(reply, choices) == letter


def test_an_open_prediction_is_found_after_answer_is():
    assert mmmu_open("The answer is cat", ["cat"]) == 1
    assert mmmu_open("The answer is B", ["B"]) == 1


def test_two_bars_are_one_in_predictions_alone():
    assert tablevqa("a||b", ["a|b"], part="vwtq") == 1
    assert tablevqa("a|b", ["a||b"], part="vwtq") == 0  # an empty item stands between the two bars
    assert tablevqa("a|b|", ["a||b"], part="vwtq_syn", rule="official") == 1


def test_open_predictions_of_the_official_parser():
    assert mmmu_open("the answer is 5cm", ["5"], rule="official") == 0  # a number ends with its word
    assert mmmu_open("the answer is 5 cm", ["5"], rule="official") == 1
    assert mmmu_open("the answer is 2.5cm", ["2.5"], rule="official") == 1  # but not one with a point
    assert mmmu_open("it is 0.333", ["0.3333"], rule="official") == 1  # rounded to 0.33
    assert mmmu_open("x = 7\nz", ["x = 7"], rule="official") == 1  # an equation in the last line only is cut
    assert mmmu_open("B", ["B"]) == 1  # read as the letter of the other option


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


@pytest.mark.parametrize(
    ("cell", "references"),
    [
        ("['a', 'b']", ("a", "b")),
        ("[2010, 2011]", ("2010", "2011")),
        ("[10-20, 3]", ("-10", "3")),
        ("[Pink, Blue]", ("[Pink, Blue]",)),
        ("[__import__('os')]", ("[__import__('os')]",)),
        ("[1/0]", ("[1/0]",)),
        (r"['a\d']", (r"a\d",)),
        ("[" * 5000, ("[" * 5000,)),
        ("([1], 2)", ("([1], 2)",)),
        ("[]", ()),
    ],
)
def test_answer_column(cell, references):
    assert read_references(cell) == references


def test_what_a_table_file_does_to_predictions():
    assert reload_predictions(["N/A", "", "a", "12.50"]) == ["nan", "nan", "a", "12.50"]
    assert reload_predictions(["007", "2"]) == ["7", "2"]
    assert reload_predictions(["12.50", "2", "null"]) == ["12.5", "2.0", "nan"]
    assert reload_predictions(["1_000", "2"]) == ["1_000", "2"]
