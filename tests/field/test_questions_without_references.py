"""A question without references is never scored, under any DataModule.

Sources: AVG-LLaVA#10; EvolvingLMMs-Lab/lmms-eval#553; open-compass/VLMEvalKit#504 and #405 (hidden answers).
"""

import json

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import get_benchmark, plain_benchmark
from alignvlm_pl.benchmarks.rows import read_row
from alignvlm_pl.cli.score import run as score
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.scoring.judge import grade
from alignvlm_pl.scoring.results import results
from alignvlm_pl.scoring.run import score_samples
from datamodules import BenchmarkDataModule, DocDownstreamDataModule
from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from tests.unit.reading import command

jsonl = command("jsonl")

PLAIN = plain_benchmark("own", metrics=("anls", "exact_match"))


def samples(*references):
    return [
        EvalSample(key=f"key{number}", prediction="yes", references=tuple(given))
        for number, given in enumerate(references)
    ]


def test_the_others_are_scored_and_the_key_is_named():
    scored = score_samples(PLAIN, samples(["yes"], [], ["no"]))
    assert (scored.num, scored.metrics["exact_match"]) == (2, 0.5)
    assert scored.problems == ["1 questions without references, not scored: key1"]
    assert [list(values) for values in scored.scores] == [["anls", "exact_match"], [], ["anls", "exact_match"]]
    assert scored.worst_first() == [2, 0, 1]
    assert results({"own": scored})["incomplete"] == {"own": scored.problems}


@pytest.mark.parametrize("blank", [[], [""], ["  "], ["", "\n"]])
def test_blank_references_are_none(blank, tmp_path, capsys):
    scored = score_samples(PLAIN, samples(["yes"], blank, ["", "yes"]))
    assert (scored.num, scored.metrics["exact_match"]) == (2, 1.0)
    assert scored.problems == ["1 questions without references, not scored: key1"]
    assert [sample.meta for sample in grade(scored.samples[1:2], judge=lambda *_: "1")] == [{}]
    rows = [{"key": str(key), "prediction": "yes", "references": given} for key, given in enumerate((["yes"], blank))]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert score(["score", "--benchmark", "docvqa", "--predictions", str(tmp_path / "p.jsonl"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "incomplete: 1 predictions without references: 1 (line 2)" in printed
    assert '"num":1' in printed.replace(" ", "")


@pytest.mark.parametrize("cell", ["", "  ", "['']", "['', ' ']", "[]"])
def test_a_blank_cell_of_a_table_is_no_reference(cell):
    assert read_row({"question": "?", "answer": cell}, get_benchmark("docvqa"))[1] == []


def test_a_dataset_without_any_reference_has_predictions_and_no_score():
    scored = score_samples(PLAIN, samples([], []))
    assert (scored.num, scored.metrics, scored.scores) == (0, {}, [{}, {}])
    assert [sample.prediction for sample in scored.samples] == ["yes", "yes"]
    found = results({"own": scored})
    assert found["benchmarks"] == {"own": {"num": 0}} and found["overall"] == {}


def test_an_annotation_and_a_grade_are_something_to_score_against():
    assert EvalSample(key="a", prediction="", meta={"gold": []}).has_reference
    assert EvalSample(key="a", prediction="", meta={"judged": 0.0}).has_reference
    assert not EvalSample(key="a", prediction="", meta={"document": "a"}).has_reference


@pytest.mark.parametrize("module", [BenchmarkDataModule, DocDownstreamDataModule])
def test_every_data_module_reads_the_question_without_references(tmp_path, module):
    Image.new("RGB", (6, 5)).save(tmp_path / "a.png")
    ask = {"role": "user", "content": "<|image|>what?"}
    rows = [
        {"messages": [ask, {"role": "assistant", "content": "yes"}]},
        {"messages": [ask]},
        {"messages": [ask], "references": [" "]},
        {"messages": [ask], "references": ["yes"]},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row | {"image": "a.png"}) for row in rows))
    assert jsonl([str(tmp_path / "q.jsonl"), str(tmp_path / "out"), "--workers", "1"]) == 0
    manifest = load_manifest(tmp_path / "out")
    decode = Decoder(adapter=module(benchmarks={"q": str(tmp_path / "out")}).adapter())
    found = [decode(raw).references for raw in read_range(manifest, 0, manifest.num_samples)]
    assert sorted(found) == [[], [], ["yes"], ["yes"]]
