"""Records of predictions, means over datasets, and files that are complete or absent."""

import json

import pytest

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.scoring.records import batch_records, to_samples
from alignvlm_pl.scoring.results import overall
from alignvlm_pl.utils.atomic_files import write_predictions, write_results


def batch(*references):
    keys = [f"k-{index}" for index in range(len(references))]
    return {
        "keys": keys,
        "questions": [f"q{key}" for key in keys],
        "references": [list(r) for r in references],
        "meta": [{"split": "human"} for _ in keys],
    }


def test_records_hold_what_metrics_need():
    records = batch_records(batch(["12.50", "12.5"], ["Lund"]), ["12.5", ""])
    assert records[1] == {
        "key": "k-1",
        "question": "qk-1",
        "prediction": "",
        "references": ["Lund"],
        "meta": {"split": "human"},
    }
    assert to_samples(records)[0].references == ("12.50", "12.5")


def test_a_lost_prediction_is_an_error_and_not_a_shift():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        batch_records(batch(["a"], ["b"]), ["a"])


def test_the_references_of_readings_are_the_texts_of_the_pages():
    read = batch(["x"], ["y"]) | {"task": "read"}
    records = batch_records(read, ["ABCD", "xb"], read=["abcd", "ab"])
    assert [(r["prediction"], r["references"]) for r in records] == [("ABCD", ["abcd"]), ("xb", ["ab"])]


def test_overall_is_a_mean_over_questions():
    results = {"large": {"num": 3, "anls": 1.0}, "small": {"num": 1, "anls": 0.0}}
    assert overall(results) == {"num": 4, "anls": 0.75}
    assert overall({"empty": {"num": 0}}) == overall({}) == {}
    assert overall({"empty": {"num": 0}, **results}) == overall(results)
    assert overall({**results, "unscored": {"num": 5}, "empty": {"num": 0}}) == overall(results)
    assert overall({**results, "other": {"num": 4, "cer": 1.0}}) == {"num": 8}


def test_files_are_whole_or_absent(tmp_path):
    write_predictions(tmp_path / "p" / "set.jsonl", [{"key": "a", "prediction": "Ä\n€"}])
    (line,) = (tmp_path / "p" / "set.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prediction"] == "Ä\n€"
    assert "Ä" in line
    write_results(tmp_path / "results.json", {"overall": {"num": 1}})
    earlier = (tmp_path / "results.json").read_text()
    with pytest.raises(TypeError):
        write_results(tmp_path / "results.json", {"bad": object()})
    assert (tmp_path / "results.json").read_text() == earlier
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["p", "results.json", "set.jsonl"]


def test_half_a_surrogate_pair_and_nan_are_written_as_json_has_them(tmp_path):
    write_predictions(tmp_path / "p.jsonl", [{"key": "a", "prediction": "x\ud83d", "score": float("nan")}])
    text = (tmp_path / "p.jsonl").read_text("utf-8")
    assert "NaN" not in text
    assert json.loads(text) == {"key": "a", "prediction": "x\ud83d", "score": None}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/p cannot be made a folder: a file is in its place"):
        write_predictions(tmp_path / "file" / "p" / "x.jsonl", [])


def test_numbers_that_are_none_are_null_in_json(tmp_path):
    write_results(tmp_path / "results.json", {"a": float("nan"), "b": [(float("inf"), 0.5)]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": None, "b": [[None, 0.5]]}
