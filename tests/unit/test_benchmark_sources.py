"""Published benchmark files -> shards: rows, pointers, invalid rows; DUE's gold; prompts at evaluation."""

import base64
import csv
import hashlib
import io
import json
import pickle
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import BENCHMARKS, Prompt, get_benchmark
from alignvlm_pl.cli import main
from alignvlm_pl.errors import DataError
from datamodules.loading.benchmark_dataset import BenchmarkDataset
from datamodules.loading.collate import Collator
from datamodules.prepare.benchmark import DocDownstreamTest, VLMEvalKitTable
from datamodules.shards.decode import Decoder
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_answers, read_range
from datamodules.shards.sample import SampleError
from datamodules.shards.sample_formats import read_docdownstream

DOCVQA = get_benchmark("docvqa")


def image_file(shade: int, format: str = "PNG", size: int = 24) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 60).point(lambda v: (v + shade) % 256).convert("RGB").save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def table(path: Path, rows: list[dict], columns: str = "index image question answer") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns.split(), delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def samples(folder: Path) -> list:
    manifest = load_manifest(folder)
    decode = Decoder(adapter=read_docdownstream)
    return [decode(raw) for raw in read_range(manifest, 0, manifest.num_samples)]


def test_rows_lists_and_pointers_become_samples(tmp_path):
    rows = [
        {"index": 5, "image": "7", "question": "forward?", "answer": "a"},
        {"index": 7, "image": image_file(1), "question": "two\nlines?", "answer": "['12 May', 'May 12']"},
        {"index": 8, "image": "7", "question": "again?", "answer": "[Pink, Blue]"},
        {"index": 9, "image": image_file(9, "BMP"), "question": "q", "answer": "nan"},
    ]
    path = table(tmp_path / "DocVQA_VAL.tsv", rows)
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    found = samples(tmp_path / "set")
    assert [sample.references for sample in found] == [["a"], ["12 May", "May 12"], ["[Pink, Blue]"], ["nan"]]
    assert found[1].messages[0]["content"] == [
        {"type": "image", "index": 0},
        {"type": "text", "text": "two\nlines?"},
    ]
    pixels = [sample.images[0].tobytes() for sample in found]
    assert pixels[0] == pixels[1] == pixels[2] != pixels[3]
    assert [sample.meta["index"] for sample in found] == ["5", "7", "8", "9"]
    manifest = load_manifest(tmp_path / "set")
    assert manifest.extra["benchmark"] == "docvqa"
    assert manifest.extra["origin"] == "DocVQA_VAL.tsv"
    assert [answer.references for answer in read_answers(tmp_path / "set")] == [tuple(s.references) for s in found]


def test_another_file_of_the_published_name_is_noticed(tmp_path, caplog):
    rows = [{"index": 1, "image": image_file(1), "question": "q", "answer": "a"}]
    path = table(tmp_path / "DocVQA_VAL.tsv", rows)
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    assert "is not the published file: expected md5 d5ee77e1926ff10690d469c56b73eabf, found" in caplog.text


def test_invalid_rows_are_named_and_counted(tmp_path, capsys, caplog):
    rows = [
        {"index": 1, "image": image_file(1), "question": "good?", "answer": "a"},
        {"index": 2, "image": "!" * 80, "question": "q", "answer": "a"},
        {"index": 3, "image": base64.b64encode(b"x" * 90).decode(), "question": "q", "answer": "a"},
        {"index": 4, "image": "99", "question": "q", "answer": "a"},
        {"index": 5, "image": "1", "question": "q", "answer": ""},
        {"index": 6, "image": "", "question": "q", "answer": "a"},
    ]
    path = table(tmp_path / "t.tsv", rows)
    path.write_text(path.read_text() + "7\tcut\n")
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    reasons = ["bad_base64", "bad_pointer", "broken_row", "missing_image", "no_answer", "undecodable_image"]
    assert load_manifest(tmp_path / "set").extra["skipped"] == dict.fromkeys(reasons, 1)
    assert f"{path}, row 3: the image: not base64" in caplog.text
    assert f"{path}, row 8: expected 4 columns, found 2" in caplog.text
    assert "is not the published file" not in caplog.text  # it does not bear the published name
    assert "marked as incomplete" in capsys.readouterr().out
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "strict"), "--strict"]) == 1
    assert "row 3" in capsys.readouterr().err
    assert not (tmp_path / "strict" / "manifest.json").exists()


ODD_ROWS = [
    ({"question": " "}, "no_question", "row 3: the question is empty"),
    ({"index": ""}, "no_index", "row 3: no index, by which"),
    ({"index": " "}, "no_index", "row 3: no index, by which"),
    ({"index": 1}, "repeated_index", "row 3: index '1' is that of an earlier row"),
    ({"answer": "C"}, "bad_answer", "row 3: the answer 'C' is none of the options A, B"),
    ({"answer": "a"}, "bad_answer", "row 3: the answer 'a' is none of the options A, B"),
    ({"answer": "['A', 'D']"}, "bad_answer", r"row 3: the answer .* is none of the options A, B"),
    ({"answer": ""}, "no_answer", "row 3: the answer is empty"),
]


@pytest.mark.parametrize(("change", "reason", "message"), ODD_ROWS)
def test_a_row_that_cannot_be_asked_joined_or_scored_is_counted(tmp_path, change, reason, message):
    good = {"question": "?", "A": "x", "B": "None", "split": "validation", "image": image_file(1)}
    rows = [
        {"index": 1, "answer": "B"},
        {"index": 2, "answer": "A"} | change,
        {"index": 3, "A": "", "B": "", "answer": "C"},
    ]
    path = table(tmp_path / "t.tsv", [good | row for row in rows], "index image question A B answer split")
    first, odd, last = VLMEvalKitTable(path=path, benchmark=get_benchmark("mmmu"))
    assert (first.record["references"], last.record["references"]) == (["B"], ["C"])
    assert odd.reason == reason
    assert re.search(message, str(odd))
    # Rows of another split are nobody's questions, whatever they hold.
    rows = [rows[1] | {"split": "dev"}, rows[0]]
    path = table(tmp_path / "t.tsv", [good | row for row in rows], "index image question A B answer split")
    assert len(list(VLMEvalKitTable(path=path, benchmark=get_benchmark("mmmu")))) == 1


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("index image question A answer", [{}], r"for mmmu: expected columns index, .*, split, found index, image"),
        (
            "Index Image Question Answer Split",
            [{}],
            "found Index, Image, .*; write the names of the columns in lower case",
        ),
        ("index image question answer split", [], r"t\.tsv holds no row"),
        (
            "index image question answer split",
            [{"split": "dev"}] * 2,
            "2 rows, none of mmmu: expected split 'validation'",
        ),
        (
            "index image question answer split",
            [{"split": "validation"}],
            r"none of 1 rows is usable \(no_question: 1\); the first: .*row 2",
        ),
        ("index image question image split answer", [{}], "has the column 'image' twice"),
    ],
)
def test_a_table_without_a_usable_row_says_why(tmp_path, capsys, columns, rows, message):
    rows = [{"index": n, "answer": "a"} | row for n, row in enumerate(rows)]
    path = table(tmp_path / "t.tsv", [{key: row[key] for key in row if key in columns} for row in rows], columns)
    assert main(["prepare", "benchmark", "mmmu", str(path), str(tmp_path / "set")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_rows_spoilt_by_bytes_or_quotes_and_repeated_ones_are_named(tmp_path):
    rows = [{"index": n, "image": image_file(n), "question": f"q{n}", "answer": "a"} for n in (1, 2, 3, 4, 2)]
    path = table(tmp_path / "t.tsv", rows)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"\tq3", b"\tq\xe9")
    lines[4] = lines[4].replace(b"\tq4", b'\t"q4')
    path.write_bytes(b"".join(lines))
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    made = load_manifest(tmp_path / "set")
    assert made.num_samples == 2
    assert made.extra["skipped"] == {"broken_row": 2, "repeated_index": 1}
    assert made.extra["skipped_first"]["broken_row"] == [
        f"{path}, row 4: not UTF-8",
        f"{path}, row 5: a quotation mark that is not closed runs into the next rows",
    ]
    output = BenchmarkDataset.from_manifest("docvqa", made, {}).problems
    assert output[0].items == tuple(made.extra["skipped_first"]["broken_row"])
    assert output[1] == (
        f"1 rows skipped when it was prepared: repeated_index ({path}, row 6: index '2' is that of an earlier row)"
    )


def test_pointers_that_go_round_are_named(tmp_path):
    around = [str(["1"] * 40), str(["3"] * 40), str(["2"] * 40)]  # longer than a pointer itself
    rows = [{"index": n, "image": cell, "question": "q", "answer": "a"} for n, cell in enumerate(around, start=1)]
    rows.append({"index": 4, "image": image_file(1), "question": "q", "answer": "a"})
    rows.append({"index": 5, "image": str(["4", "4"]), "question": "q", "answer": "a"})
    path = table(tmp_path / "t.tsv", rows)
    found = list(VLMEvalKitTable(path=path, benchmark=DOCVQA))
    assert [getattr(sample, "reason", "") for sample in found] == ["bad_pointer"] * 3 + ["", ""]
    assert "row 2: the image points to row index '1', which itself points to another" in str(found[0])
    assert len(found[4].images) == 2


def test_one_row_at_a_time_is_in_memory(tmp_path):
    large = image_file(3, size=600)
    rows = [{"index": n, "image": large, "question": "q", "answer": "a"} for n in range(40)]
    path = table(tmp_path / "t.tsv", rows)
    assert path.stat().st_size > 30 * len(large)
    tracemalloc.start()
    count = sum(not isinstance(sample, SampleError) for sample in VLMEvalKitTable(path=path, benchmark=DOCVQA))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40
    assert peak < 12 * len(large)  # a few copies of one row, not forty


def test_options_images_by_path_and_their_places(tmp_path):
    for name in ("one.png", "two.png"):
        (tmp_path / name).write_bytes(base64.b64decode(image_file(len(name))))
    rows = [
        {
            "index": 1,
            "image_path": "['one.png', 'two.png']",
            "question": "Which, <image 2> or another?",
            "A": "this <image 1>",
            "B": "that",
            "answer": "A",
            "split": "validation",
        },
        {"index": 2, "image_path": "one.png", "question": "How many?", "answer": "3", "split": "validation"},
        {"index": 3, "image_path": "one.png", "question": "q", "answer": "3", "split": "dev"},
    ]
    path = table(tmp_path / "t.tsv", rows, "index image_path question A B answer split")
    assert main(["prepare", "benchmark", "mmmu", str(path), str(tmp_path / "set")]) == 0
    first, second = samples(tmp_path / "set")  # the one of the other split is skipped
    mmmu = get_benchmark("mmmu")
    parts = mmmu.prompt_for(first.meta).apply(first.messages[0]["content"], first.meta)
    shown = [part.get("text", f"#{part.get('index')}") for part in parts]
    assert shown[:5] == ["Question: ", "Which, ", "#1", " or another?", "\nOptions:\nA. this "]
    assert shown[5] == "#0"
    assert shown[6].startswith("\nB. that\nChoose")
    parts = mmmu.prompt_for(second.meta).apply(second.messages[0]["content"], second.meta)
    assert [part.get("text", "#") for part in parts] == ["#", "Question: ", "How many?"]


def test_a_missing_or_foreign_file_says_what_to_fetch(tmp_path, capsys):
    for name, message in [
        ("none.tsv", "DocVQA_VAL.tsv (5,349 questions), to be fetched from https://"),
        ("file.parquet", "expected a .tsv or .jsonl file"),
        ("file.jsonl", "docvqa is not made from .jsonl files; docvqa is made from DocVQA_VAL.tsv"),
    ]:
        assert main(["prepare", "benchmark", "docvqa", str(tmp_path / name), str(tmp_path / "set")]) == 1
        assert message in capsys.readouterr().err
    assert main(["prepare", "benchmark", "mmmu", str(tmp_path / "none.tsv"), str(tmp_path / "set")]) == 1
    assert "MMMU_DEV_VAL.tsv (1,050 rows, of which the 900 of the validation" in capsys.readouterr().err
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    assert main(["prepare", "benchmark", "docvqa", str(tmp_path / "other.tsv"), str(tmp_path / "set")]) == 1
    assert "is no table of VLMEvalKit" in capsys.readouterr().err
    assert main(["prepare", "benchmark", "wtq", str(tmp_path / "x.tsv"), str(tmp_path / "set")]) == 1
    assert "WikiTableQuestions_test.jsonl (4,343 questions)" in capsys.readouterr().err


def test_a_missing_file_does_not_cost_the_dataset_that_it_would_replace(tmp_path, capsys):
    path = table(tmp_path / "a.tsv", [{"index": "1", "image": image_file(0), "question": "?", "answer": "a"}])
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    path.unlink()
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set"), "--overwrite"]) == 1
    assert "there is no" in capsys.readouterr().err
    assert len(samples(tmp_path / "set")) == 1


def due(folder: Path) -> Path:
    folder.mkdir()
    documents = [
        {"name": "contract-1", "annotations": [{"key": "advertiser", "values": [{"value": "Acme"}]}]},
        {
            "name": "contract-2",
            "annotations": [
                {"key": "advertiser", "values": [{"value": "B", "value_variants": ["B", "Bee"]}]},
                {"key": "contract_num", "values": [{"value": "17"}]},
            ],
        },
    ]
    asked = [("contract-1", "advertiser"), ("contract-2", "advertiser"), ("contract-2", "contract_num")]
    lines = [
        {
            "file_name": f"pngs/{name}.pdf_0.png",
            "ground_truth": json.dumps({"gt_parses": [{"question": field, "answer": "x"}]}),
        }
        for name, field in asked
    ]
    for name, rows in [("document", documents), ("metadata", lines)]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def questions(path: Path) -> Path:
    (path.parent / "page.png").write_bytes(base64.b64decode(image_file(1)))
    asked = ["gross_amount", "advertiser", "contract_num"]  # the first is not what DUE asks
    rows = [
        {
            "image": ["page.png"],
            "messages": [
                {"role": "user", "content": f"<|image|>What is the value for the {field}?"},
                {"role": "assistant", "content": "x"},
            ],
            "task_name": "qa_sft",
            "dataset_name": "DeepForm",
        }
        for field in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gold_of_documents_comes_from_due(tmp_path):
    path, meta = questions(tmp_path / "DeepForm_test.jsonl"), due(tmp_path / "meta")
    words = ["prepare", "benchmark", "deepform", str(path), str(tmp_path / "set")]
    assert main([*words, "--meta", str(meta)]) == 0
    found = samples(tmp_path / "set")
    assert [sample.meta["document"] for sample in found] == ["contract-1", "contract-2", "contract-2"]
    assert found[0].meta["gold"] == [{"key": "advertiser", "values": [{"value": "Acme"}]}]
    assert [sample.meta["field"] for sample in found] == ["advertiser", "advertiser", "contract_num"]

    from alignvlm_pl.scoring.run import score_samples

    answers = [
        replace(a, prediction=p) for a, p in zip(read_answers(tmp_path / "set"), ["acme", "bee", "18"], strict=True)
    ]
    scored = score_samples(get_benchmark("deepform"), answers)
    assert scored.metrics["precision"] == scored.metrics["recall"] == pytest.approx(2 / 3)
    assert scored.problems == ["3 of 1,500 questions"]


def test_due_refuses_what_is_not_parallel_or_missing(tmp_path, capsys):
    path, meta = questions(tmp_path / "DeepForm_test.jsonl"), due(tmp_path / "meta")
    words = ["prepare", "benchmark", "deepform", str(path), str(tmp_path / "set")]
    assert main(words) == 1
    assert "--meta" in capsys.readouterr().err
    (meta / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    assert main([*words, "--meta", str(meta)]) == 1
    assert "must be parallel" in capsys.readouterr().err
    (meta / "document.jsonl").write_text('{"name": "a", "annotations": [{"key": "k"}]}\n')
    assert main([*words, "--meta", str(meta)]) == 1
    assert "document.jsonl, line 1: KeyError('values')" in capsys.readouterr().err
    (meta / "document.jsonl").unlink()
    assert main([*words, "--meta", str(meta)]) == 1
    assert "there is no" in (output := capsys.readouterr().err)
    assert "document.jsonl" in output
    assert "https://huggingface.co/datasets/mPLUG/DocDownstream-1.0" in output


def test_questions_are_those_of_due_to_the_letter(tmp_path):
    path, meta = questions(tmp_path / "DocVQA_test.jsonl"), tmp_path / "meta"
    meta.mkdir()
    gold = [
        {"key": "who pays?", "values": [{"value": "Acme", "value_variants": ["Acme", "ACME Inc."]}]},
        {"key": "who", "values": [{"value": "nobody"}]},
        {"key": "who pays", "values": [{"value": " "}]},
    ]
    (meta / "document.jsonl").write_text(json.dumps({"name": "a_b", "annotations": gold}) + "\n")
    asked = [
        {"gt_parses": [{"question": "who pays?"}]},
        {"gt_parses": [{"question": "who pays"}]},
        {"gt_parses": []},
    ]
    lines = [{"file_name": "x/a_b.pdf_3.png", "ground_truth": json.dumps(truth)} for truth in asked]
    (meta / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = DocDownstreamTest(path=path, benchmark=get_benchmark("wtq"), image_root=tmp_path, meta=meta)
    first, second, third = source
    assert first.record["references"] == ["Acme"]
    assert (second.reason, third.reason) == ("no_answer", "bad_metadata")
    assert "line 2: no gold answer to 'who pays'" in str(second)
    variants = replace(source, benchmark=get_benchmark("docvqa"))
    assert next(iter(variants)).record["references"] == ["Acme", "ACME Inc."]


def test_odd_lines_of_a_question_file_are_named(tmp_path):
    path = questions(tmp_path / "TabFact_test.jsonl")
    good = json.loads(path.read_text().splitlines()[0])
    odd = [{**good, "image": image} for image in (5, [5], "nul\0.png", "none.png")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *odd, [1]]) + "[" * 100_000 + "\n")
    source = DocDownstreamTest(path=path, benchmark=get_benchmark("tabfact"), image_root=tmp_path)
    reasons = [getattr(found, "reason", "") for found in source]
    assert reasons == ["", "bad_row", "bad_row", "unsafe_path", "missing_image", "bad_json", "bad_json"]


def test_tabfact_takes_its_references_from_the_question_file(tmp_path, capsys):
    path, meta = questions(tmp_path / "TabFact_test.jsonl"), due(tmp_path / "meta")
    words = ["prepare", "benchmark", "tabfact", str(path), str(tmp_path / "set")]
    assert main([*words, "--meta", str(meta)]) == 1
    assert "remove --meta" in capsys.readouterr().err
    assert main(words) == 0


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = questions(tmp_path / "WikiTableQuestions_test.jsonl")
    text = path.read_text().replace("What is", "What\u2028is\x85")
    path.write_text(text, encoding="utf-8")
    assert len(text.splitlines()) > 3
    assert main(["prepare", "benchmark", "wtq", str(path), str(tmp_path / "set")]) == 0
    made = load_manifest(tmp_path / "set")
    assert made.num_samples == 3
    # DocDownstream's copy lacks a question, the release does not.
    assert BenchmarkDataset.from_manifest("wtq", made, {}).expected == 4343
    assert get_benchmark("wtq").size_from("") == 4344


def test_a_prompt_file_replaces_ours_and_says_whether_it_is_the_references(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Read the table.\n{question}\nAnswer:")
    known = get_benchmark("tablevqa").prompts["vwtq"]
    assert known.is_reference is False
    prompt = Prompt.read(path, known)
    assert (prompt.prefix, prompt.suffix) == ("Read the table.\n", "\nAnswer:")
    assert prompt.is_reference is False
    digest = hashlib.sha256(b"Read the table.\n").hexdigest()[:16]
    assert Prompt.read(path, replace(known, reference_sha256=digest)).is_reference is True
    path.write_text("no question")
    with pytest.raises(DataError, match="once, found it 0 times"):
        Prompt.read(path, known)


def test_the_benchmarks_prompt_is_what_the_model_is_asked(tmp_path):
    class Processor:
        def encode(self, messages, images, **options):
            return [part.get("text", "#") for part in messages[-1]["content"]]

    path = table(tmp_path / "t.tsv", [{"index": 1, "image": image_file(1), "question": "who?", "answer": "a"}])
    assert main(["prepare", "benchmark", "docvqa", str(path), str(tmp_path / "set")]) == 0
    (sample,) = samples(tmp_path / "set")
    collator = Collator(processor=Processor(), generation=True, benchmark=DOCVQA)
    assert collator.encode(sample).encoded == ["#", "who?", DOCVQA.prompt.suffix]


def test_processes_that_load_data_can_be_sent_every_benchmark():
    assert pickle.loads(pickle.dumps(BENCHMARKS)) == BENCHMARKS
