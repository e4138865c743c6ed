"""Scoring a set: exact under any order, groups, intervals, and what is incomplete."""

import random
from dataclasses import replace

import pytest

from alignvlm_pl.benchmarks import BENCHMARKS, get_benchmark, plain_benchmark
from alignvlm_pl.errors import ConfigError
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.metrics.document_f1 import DOCUMENT_F1
from alignvlm_pl.metrics.multiple_choice import MULTIPLE_CHOICE
from alignvlm_pl.scoring.records import (
    merge_records,
    page_path,
    scored_records,
    to_records,
    to_samples,
    unread,
)
from alignvlm_pl.scoring.run import score_samples


def samples(count: int = 60) -> list[EvalSample]:
    rng = random.Random(3)
    texts = ["Lund", "12.5", "Harbour Street", "7 May", "Lunt", "12.50", "harbour street 4"]
    return [
        EvalSample(
            key=f"k{index:03d}",
            prediction=rng.choice(texts),
            references=(rng.choice(texts), "7"),
            meta={"split": rng.choice(["human", "augmented"])},
        )
        for index in range(count)
    ]


def test_the_order_of_the_predictions_changes_nothing():
    plain = plain_benchmark("set", metrics=("anls", "exact_match"))
    first = score_samples(plain, samples())
    shuffled = samples()
    random.Random(1).shuffle(shuffled)
    assert score_samples(plain, shuffled).metrics == first.metrics
    assert 0 < first.metrics["anls"] < 1


def test_intervals_hold_the_score_and_are_the_same_again():
    plain = plain_benchmark("set", metrics=("exact_match",))
    first, again = score_samples(plain, samples()), score_samples(plain, samples())
    assert first.intervals == again.intervals
    low, high = first.intervals["exact_match"]
    assert low < first.metrics["exact_match"] < high
    # A share of 20 % among 60: the normal approximation gives half a width of about 0.1.
    assert 0.1 < high - low < 0.4
    assert score_samples(plain, samples(), resamples=0).intervals == {}


def test_groups_and_rules_have_scores():
    scored = score_samples(get_benchmark("chartqa"), samples())
    name = "relaxed_accuracy"
    assert {name, f"{name}/human", f"{name}/augmented", f"{name}@vlmevalkit-2025-02"} <= set(scored.metrics)
    sizes = {group: sum(a.meta["split"] == group for a in samples()) for group in ("human", "augmented")}
    mean = sum(scored.metrics[f"{name}/{group}"] * size for group, size in sizes.items()) / 60
    assert scored.metrics[name] == pytest.approx(mean)
    assert scored.headline == (name, scored.metrics[name])


def test_part_of_a_benchmark_is_marked():
    scored = score_samples(get_benchmark("docvqa"), samples(), problems=["2 rows lost"])
    assert scored.problems == ["2 rows lost", "60 of 5,349 questions"]
    assert score_samples(plain_benchmark("own", metrics=("anls",)), samples()).problems == []
    assert score_samples(get_benchmark("docvqa"), samples(), expected=60).problems == []
    nothing = score_samples(get_benchmark("docvqa"), [])
    assert nothing.num == 0
    assert nothing.metrics == {}
    assert nothing.problems == ["0 of 5,349 questions"]


def test_predictions_that_a_metric_cannot_score_are_named():
    good = EvalSample(key="a", prediction="4", references=("4",), meta={"split": "vwtq"})
    odd = [
        EvalSample(key=key, prediction="4", references=("4",), meta=meta)
        for key, meta in [("b", {}), ("c", {"split": "vtabfct"}), ("d", {"split": 3})]
    ]
    scored = score_samples(get_benchmark("tablevqa"), [good, *odd])
    assert scored.metrics["tablevqa/vwtq" if "tablevqa/vwtq" in scored.metrics else "vwtq"] == 1.0
    assert scored.problems[0].startswith("3 predictions cannot be scored: b (")
    assert scored.scores[1] == {}


def test_a_document_without_name_or_annotation_is_named():
    field = {"prediction": "x", "question": "What is the value for the advertiser?", "references": ("x",)}
    gold = [{"key": "advertiser", "values": [{"value": "x"}]}]
    rows = [
        EvalSample(key="a", meta={"document": "one", "gold": gold}, **field),
        EvalSample(key="b", meta={"gold": gold}, **field),
        EvalSample(key="c", meta={"document": "two"}, **field),
        EvalSample(key="d", meta={"document": "three", "gold": [{"key": "advertiser"}]}, **field),
    ]
    scored = score_samples(get_benchmark("deepform"), rows)
    assert scored.headline[1] == 1.0
    assert scored.problems[0].startswith("3 predictions cannot be scored: b (document_f1: 'b' names no document")


def test_a_rule_without_what_it_needs_is_not_reported():
    plain = [EvalSample(key="a", prediction="1000", references=("1,000",))]
    known = [replace(plain[0], meta={"canonical": ["1000.0"]})]
    wtq = get_benchmark("wtq")
    assert "wtq@official-canonical" not in score_samples(wtq, plain).metrics
    assert score_samples(wtq, known).metrics["wtq@official-canonical"] == 1.0
    mixed = score_samples(wtq, [*known, replace(plain[0], key="b")])
    assert mixed.problems[0] == "1 predictions cannot be scored: b (rule official-canonical needs meta['canonical'])"
    with pytest.raises(ConfigError, match="needs meta\\['canonical'\\], which no prediction has"):
        score_samples(wtq, plain, rule="official-canonical")


def test_equal_rules_are_computed_once(monkeypatch):
    from alignvlm_pl.metrics.vcr import VCR

    calls = []
    metric = replace(VCR, statistics=lambda rows, rule: calls.append(rule) or VCR.statistics(rows, rule))
    monkeypatch.setattr("alignvlm_pl.benchmarks.base.get_metric", lambda name: metric)
    scored = score_samples(
        get_benchmark("vcr_easy"), [EvalSample(key="a", prediction="in Lund", references=("in Lund",))]
    )
    assert calls == [VCR.rules[0]]
    assert {f"exact_match@{rule}" for rule in VCR.rules[1:]} <= set(scored.metrics)


def test_one_rule_alone_and_an_unknown_one():
    scored = score_samples(get_benchmark("docvqa"), samples(), rule="due")
    assert list(scored.metrics) == list(scored.intervals) == ["anls@due"]
    assert set(scored.scores[0]) == {"anls@due"}
    with pytest.raises(ConfigError, match="vlmevalkit-2025-02"):
        score_samples(get_benchmark("docvqa"), samples(), rule="vlmeval")


def test_rules_disagree_on_the_border():
    half = EvalSample(key="a", prediction="abcd", references=("abef",))  # similarity exactly 0.5
    scored = score_samples(get_benchmark("docvqa"), [half, EvalSample(key="b", prediction="x", references=("x",))])
    assert scored.disagreements() == [0]
    assert scored.scores[0]["anls"] == 0.5
    assert scored.scores[0]["anls@due"] == 0.0
    assert scored.worst_first() == [0, 1]


def test_only_the_split_of_the_benchmark_counts():
    rows = [
        EvalSample(
            key=split,
            prediction="A",
            references=("A",),
            meta={"split": split, "choices": {"A": "x", "B": "y"}},
        )
        for split in ("dev", "validation")
    ]
    assert score_samples(get_benchmark("mmmu"), rows).num == 1


def test_a_rule_of_the_metric_that_the_benchmark_does_not_report_is_scored_when_asked_for():
    meta = {"choices": {"A": "x", "B": "y"}, "split": "validation"}
    row = EvalSample(key="a", prediction="B", references=("B",), meta=meta)
    mmmu = get_benchmark("mmmu")
    assert "accuracy@lmms-eval" not in score_samples(mmmu, [row]).metrics
    assert score_samples(mmmu, [row], rule="lmms-eval").metrics == {"accuracy@lmms-eval": 1.0}
    with pytest.raises(ConfigError, match=r"no metric of mmmu has a rule 'x'; known: .*official"):
        score_samples(mmmu, [row], rule="x")


def test_odd_grades_are_named_and_the_others_scored():
    grades = {"a": 0.5, "b": "abc", "c": None, "d": 7, "e": True, "f": 1}
    rows = [
        EvalSample(key=key, prediction="x", references=("x",), meta={"category": "ocr", "judged": grade})
        for key, grade in grades.items()
    ]
    scored = score_samples(get_benchmark("mmvet"), [*rows, replace(rows[0], key="g", meta={})])
    assert (scored.metrics["score"], scored.num) == (0.75, 2)
    assert scored.problems[0].items[1] == "c (has no grade of the judge)"
    assert [item[0] for item in scored.problems[0].items] == ["b", "c", "d", "e", "g"]
    with pytest.raises(ConfigError, match="no score of a judge"):
        score_samples(get_benchmark("mmvet"), [rows[2]])


def test_predictions_that_are_not_scored_are_not_counted():
    good = EvalSample(key="a", prediction="4", references=("4",), meta={"split": "vwtq"})
    scored = score_samples(get_benchmark("tablevqa"), [good, replace(good, key="b", meta={})])
    assert scored.num == 1
    assert scored.problems[1] == "1 of 1,500 questions"
    assert score_samples(get_benchmark("tablevqa"), [good], whole=False).problems == []


@pytest.mark.parametrize("rule", MULTIPLE_CHOICE.rules)
def test_what_is_no_choice_or_no_text_counts_under_no_rule(rule):
    good = EvalSample(key="a", prediction="B", references=("B",), meta={"choices": {"A": "x", "B": "y"}})
    odd = [replace(good, key="b", meta={"choices": ["x", "y"]}), replace(good, key="c", references=(5,))]
    scored = score_samples(
        get_benchmark("mmmu"),
        [replace(a, meta={**a.meta, "split": "validation"}) for a in (good, *odd)],
        rule=rule,
    )
    assert scored.num == 1
    assert scored.problems[0].startswith("2 predictions cannot be scored: b (")


@pytest.mark.parametrize("rule", DOCUMENT_F1.rules)
def test_a_document_with_two_annotations_or_numbers_in_them_counts_under_no_rule(rule):
    def row(key, document, value):
        gold = [{"key": "advertiser", "values": [{"value": value}]}]
        meta = {"document": document, "gold": gold}
        return EvalSample(key=key, prediction="x", question="the advertiser?", references=("x",), meta=meta)

    rows = [row("a", "one", "x"), row("b", "two", "x"), row("c", "two", "y"), row("d", "three", 5)]
    scored = score_samples(get_benchmark("deepform"), rows, rule=rule)
    assert (scored.headline[1], scored.num) == (1.0, 1)
    assert [item[0] for item in scored.problems[0].items] == ["b", "c", "d"]
    assert "rows of document 'two' have different annotations" in scored.problems[0]


@pytest.mark.parametrize("canonical", [None, [], ""])
def test_empty_canonical_forms_are_none(canonical):
    row = EvalSample(key="a", prediction="1000", references=("1,000",), meta={"canonical": canonical})
    scored = score_samples(get_benchmark("wtq"), [row])
    assert "wtq@official-canonical" not in scored.metrics
    odd = replace(row, key="b", references=("a", "b", "c"), meta={"canonical": "abc"})
    known = replace(row, key="c", meta={"canonical": ["1000.0"]})
    mixed = score_samples(get_benchmark("wtq"), [row, odd, known])
    assert mixed.metrics["wtq@official-canonical"] == 1.0
    assert mixed.problems[0].startswith("2 predictions cannot be scored: a (rule official-canonical needs")


def test_records_of_samples_that_could_not_be_read_are_no_predictions():
    bad = {"key": "z", "prediction": "", "references": ["x"], "error": ["undecodable_image", "z.png"]}
    records = [*to_records(samples(3)), bad, {**bad, "key": "y", "error": "lost"}]
    assert [sample.key for sample in to_samples(records)] == ["k000", "k001", "k002"]
    assert unread(records) == [
        "1 samples could not be read, undecodable_image: z (z.png)",
        "1 samples could not be read, unknown: y (lost)",
    ]


def test_names_of_pages_are_short_and_apart(tmp_path):
    keys = ["a", "a/b", "日本" * 60 + "1", "日本" * 60 + "2", "\ud83d"]
    paths = {page_path(tmp_path, "set", key) for key in keys}
    assert len(paths) == len(keys)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")  # the file system takes it


def test_the_answer_cue_of_the_prompt_is_no_part_of_a_prediction():
    row = EvalSample(key="a", prediction="Answer: 1,000", references=("1,000",), meta={"split": "vwtq"})
    scored = score_samples(get_benchmark("tablevqa"), [row])
    assert scored.metrics["vwtq"] == 1.0
    assert scored.metrics["vwtq@official"] == 0.0


def test_records_keep_everything_and_empty_predictions():
    given = [EvalSample(key="b", prediction="", references=("x",), meta={"split": "human"}), *samples(2)]
    records = merge_records(to_records(given))
    assert [record["key"] for record in records] == ["b", "k000", "k001"]
    assert to_samples(records)[0] == given[0]
    written = scored_records(records, score_samples(plain_benchmark("set", metrics=("anls",)), to_samples(records)))
    assert written[0] == {
        "key": "b",
        "prediction": "",
        "references": ["x"],
        "meta": {"split": "human"},
        "anls": 0.0,
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_everything(name):
    benchmark = get_benchmark(name)
    assert benchmark.name == name
    assert benchmark.size > 0
    assert benchmark.paper
    assert benchmark.licence != "unknown"
    assert all(source.file and source.url.startswith("https://") for source in benchmark.sources)
    assert benchmark.sources
    for scoring in benchmark.scorings:
        metric, rules = scoring.load()
        assert rules[0] == metric.rules[0]
