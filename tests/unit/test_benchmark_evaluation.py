"""What the callback makes of gathered records: nothing that is wrong with them is dropped."""

from types import SimpleNamespace

import pytest

from alignvlm_pl.benchmarks import get_benchmark
from callbacks.benchmark_evaluation import BenchmarkEvaluation


def trainer(name, size):
    answered = SimpleNamespace(problems=["2 rows left out"], expected=None, benchmark=get_benchmark(name))
    data = SimpleNamespace(benchmark_size=lambda name, limit: size, benchmark_set=lambda name: answered)
    return SimpleNamespace(datamodule=data)


def record(key, **fields):
    return {"key": key, "question": "q", "prediction": "4", "references": ["4"], "meta": {}, **fields}


@pytest.mark.parametrize("limit", [None, 3])
def test_problems_of_the_set_the_samples_and_the_answers_are_kept(limit):
    records = [
        record("a", meta={"split": "vwtq"}),
        record("b"),  # of no part: it cannot be scored
        record("c", prediction="", error=["undecodable_image", "c.png"]),
    ]
    scored = BenchmarkEvaluation()._score(trainer("tablevqa", 3), "tablevqa", records, limit)
    assert scored.num == 1
    assert scored.problems[:2] == [
        "2 rows left out",
        "1 samples could not be read, undecodable_image: c (c.png)",
    ]
    assert scored.problems[2].startswith("1 answers cannot be scored: b (")
    assert scored.problems[3:] == ([] if limit else ["1 of 1,500 questions"])


@pytest.mark.parametrize("limit", [None, 2])
def test_answers_without_a_judge_keep_their_problems_too(limit):
    records = [record("a"), record("b", error=["undecodable_image", "b.png"])]
    scored = BenchmarkEvaluation()._score(trainer("mmvet", 2), "mmvet", records, limit)
    assert (scored.num, scored.figures) == (0, {})
    assert scored.problems == [
        "2 rows left out",
        "1 samples could not be read, undecodable_image: b (b.png)",
        "1 answers have no grade: set benchmark.judge",
    ]
