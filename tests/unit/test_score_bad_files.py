"""Odd rows of prediction files: named with their line, counted, and never the end of the others."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.cli import main
from alignvlm_pl.errors import DataError
from alignvlm_pl.scoring.files import read_predictions
from datamodules.shards.writer import ShardWriter

DOCVQA = get_benchmark("docvqa")


def row(key: str, prediction: str = "Lund") -> dict:
    return {"key": key, "question": "where?", "prediction": prediction, "references": ["Lund"]}


def jsonl(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_odd_records_of_json_are_named(tmp_path):
    table = [
        {"index": 1, "prediction": "a", "answer": "a"},
        {"index": 2, "answer": "a"},
        5,
        {"prediction": "a"},
    ]
    (tmp_path / "r.json").write_text(json.dumps(table))
    found = read_predictions(tmp_path / "r.json", DOCVQA)
    assert [sample.key for sample in found.samples] == ["1"]
    assert found.problems == [
        "1 rows without prediction: record 2",
        "1 records that are no objects: record 3 (5)",
        "1 rows without index: record 4",
    ]
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="does not read as a table"):
        read_predictions(tmp_path / "r.json", DOCVQA)


def test_an_answer_that_is_no_option_is_named(tmp_path):
    options = {"A": "x", "B": "y", "prediction": "A", "split": "validation"}
    table = [{"index": index, "answer": answer, **options} for index, answer in enumerate("ABCa")]
    table.append({"index": 9, "answer": "C", **options, "split": "dev"})
    (tmp_path / "r.json").write_text(json.dumps(table))
    found = read_predictions(tmp_path / "r.json", get_benchmark("mmmu"))
    assert [sample.key for sample in found.samples] == ["0", "1", "9"]
    (problem,) = found.problems
    assert problem.startswith("2 rows whose answer is no option: record 3 (the answer 'C' is none of the options A, B)")


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_deeply_nested_line_is_named(tmp_path, depth):
    deep = json.dumps(row("b"))[:-1] + ', "meta": {"a": ' + "[" * depth + "]" * depth + "}}"
    path = jsonl(tmp_path / "p.jsonl", row("a"), deep)
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={tmp_path / 'out'}"]) == 0
    problems = json.loads((tmp_path / "out/problems.json").read_text())["docvqa"]
    assert problems[0]["items"][0].startswith("line 2 (")


def test_everything_that_is_wrong_is_in_one_file(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", row("a"), *("{" for _ in range(9)), row("twice"), row("twice"))
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={tmp_path / 'out'}"]) == 0
    assert "line 6 (" in (output := capsys.readouterr().out)
    assert "line 7 (" not in output  # only the first are printed
    broken, repeated, size = json.loads((tmp_path / "out/problems.json").read_text())["docvqa"]
    assert [item.split(" (")[0] for item in broken["items"]] == [f"line {n}" for n in range(2, 11)]
    assert repeated["items"] == ["twice (line 11, line 12)"]
    assert size == {"problem": "1 of 5,349 questions", "items": []}


def answered(folder: Path, keys: int) -> None:
    """Write a set; its keys are own-00000000 and so on."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    with ShardWriter(folder, name="own", source="made", license="CC0-1.0") as out:
        for _ in range(keys):
            content = [{"type": "image", "index": 0}, {"type": "text", "text": "where?"}]
            out.add(
                {"messages": [{"role": "user", "content": content}], "references": ["Lund"]},
                [picture],
                ["png"],
            )


def test_samples_that_could_not_be_read_stay_unscored_again_and_again(tmp_path, capsys):
    answered(tmp_path / "set", 2)
    bad = {**row("own-00000001", ""), "error": ["undecodable_image", "own-00000001: cut"]}
    path = jsonl(tmp_path / "p.jsonl", row("own-00000000"), bad)
    words = ["score", "--benchmark=docvqa", "--json", f"--answers={tmp_path / 'set'}"]
    for again in range(2):
        assert main([*words, f"--predictions={path}", f"--out={tmp_path / str(again)}"]) == 0
        output = capsys.readouterr().out
        scores = json.loads(output.splitlines()[-1])
        assert (scores["num"], scores["anls"], scores["complete"]) == (1, 1.0, False)
        assert "1 samples could not be read, undecodable_image: own-00000001 (own-00000001: cut)" in output
        assert "predictions missing" not in output
        path = tmp_path / str(again) / "predictions" / "docvqa.jsonl"


def test_half_a_surrogate_pair_comes_through(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", row("a"), row("b\ud83d", "x\ud83d"), row("b\ud83d"), row("c", "x\ud83d"))
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={tmp_path / 'out'}"]) == 0
    assert "b\\ud83d (line 2, line 3)" in capsys.readouterr().out
    lines = (tmp_path / "out/predictions/docvqa.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[1])["prediction"] == "x\ud83d"


def test_a_file_is_no_folder_for_reports(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", row("a"))
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={path}"]) == 1
    assert "expected a folder, found a file" in capsys.readouterr().err
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={path / 'below'}"]) == 1
    assert "cannot be made a folder" in capsys.readouterr().err
