"""Prediction files made elsewhere, good and bad, and the `score` command over them."""

import json
from pathlib import Path

import pytest

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.cli import main
from alignvlm_pl.errors import DataError
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.scoring.files import join_gold, read_predictions

DOCVQA = get_benchmark("docvqa")


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(key: str, prediction: str = "Lund", references: tuple[str, ...] = ("Lund",)) -> dict:
    return {"key": key, "question": "where?", "prediction": prediction, "references": list(references)}


def test_our_own_file(tmp_path):
    found = read_predictions(jsonl(tmp_path / "p.jsonl", row("a"), row("b", "")), DOCVQA)
    assert found.samples[0] == EvalSample(key="a", prediction="Lund", references=("Lund",), question="where?")
    assert found.problems == []


def test_bad_lines_are_named_and_counted(tmp_path):
    rows = [row("a"), "{broken", row("twice"), {"key": "b"}, row("twice"), {**row("c"), "prediction": 3}]
    found = read_predictions(jsonl(tmp_path / "p.jsonl", *rows), DOCVQA)
    assert [sample.key for sample in found.samples] == ["a"]
    broken, repeated = found.problems
    assert broken.startswith("3 lines that are no prediction record: line 2 (")
    assert "line 4 ('prediction' must be text, found None), line 6 ('prediction' must be text, found 3)" in broken
    assert repeated == "1 keys repeated, none of their rows counts: twice (line 3, line 5)"


def test_a_line_that_is_no_utf8_is_named_and_the_mark_of_its_order_is_passed_over(tmp_path):
    path = tmp_path / "p.jsonl"
    good = json.dumps(row("a")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + good.replace(b"Lund", b"L\xfcnd") + b"\n")
    found = read_predictions(path, DOCVQA)
    assert [sample.key for sample in found.samples] == ["a"]
    assert found.problems[0].startswith("1 lines that are no prediction record: line 2 ('utf-8'")


TABLE = [
    {"index": 1, "question": "q1", "answer": "['Lund', 'Malmö']", "prediction": "Malmö", "split": "val"},
    {"index": 2, "question": "q2", "answer": "12", "prediction": None},
    {"index": 3, "question": "q3", "answer": "nan", "prediction": "N/A"},
    {"index": 4, "question": "q4", "answer": None, "prediction": "x"},
]


def xlsx(path: Path, rows: list[dict]) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    names = list(rows[0])
    book.active.append(names)
    for values in rows:
        book.active.append([values.get(name) for name in names])
    book.save(path)
    return path


def as_json(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def as_columns(path: Path, rows: list[dict]) -> Path:
    columns = {name: {str(n): values.get(name) for n, values in enumerate(rows)} for name in rows[0]}
    path.write_text(json.dumps(columns))
    return path


def tsv(path: Path, rows: list[dict]) -> Path:
    names = list(rows[0])
    lines = ["\t".join(names), *("\t".join(str(r.get(n) or "") for n in names) for r in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("write", "name"), [(xlsx, "r.xlsx"), (as_json, "r.json"), (as_columns, "r.json"), (tsv, "r.tsv")]
)
def test_result_tables_are_read_as_their_toolkit_reads_them(tmp_path, write, name):
    found = read_predictions(write(tmp_path / name, TABLE), DOCVQA)
    assert [(a.key, a.prediction, a.references) for a in found.samples] == [
        ("1", "Malmö", ("Lund", "Malmö")),
        # JSON keeps texts apart from missing values; the others are read by pandas.
        *(
            [("2", "", ("12",)), ("3", "N/A", ("nan",))]
            if name == "r.json"
            else [("2", "nan", ("12",)), ("3", "nan", ("nan",))]
        ),
        ("4", "x", ()),
    ]
    assert found.samples[0].meta == {"split": "val", "index": "1"}
    assert found.problems == []
    assert [note[:21] for note in found.notes] == ([] if name == "r.json" else ["2 predictions change "])


def test_rows_of_a_table_that_do_not_read_are_named(tmp_path):
    path = tmp_path / "r.tsv"
    path.write_text("index\tanswer\tprediction\n1\ta\ta\n2\ta\n3\ta\ta\tb\n\ta\ta\n", "utf-8-sig")
    found = read_predictions(path, DOCVQA)
    assert [sample.key for sample in found.samples] == ["1"]
    assert found.problems == [
        "2 broken rows: row 3 (expected 3 columns, found 2), row 4 (expected 3 columns, found 4)",
        "1 rows without index: row 5",
    ]


def test_a_workbook_whose_rows_end_early_keeps_its_columns(tmp_path):
    import zipfile

    path = xlsx(tmp_path / "r.xlsx", [{"index": 1, "prediction": "x", "answer": "x"}, {"index": 2, "prediction": "x"}])
    stripped = tmp_path / "s.xlsx"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(stripped, "w") as target:
        for item in source.namelist():
            text = source.read(item)
            target.writestr(item, text.replace(b'<dimension ref="A1:C3"/>', b"") if "sheet1" in item else text)
    found = read_predictions(stripped, DOCVQA)
    assert [(sample.key, sample.references) for sample in found.samples] == [("1", ("x",)), ("2", ())]


def test_options_become_choices(tmp_path):
    table = [{"index": 7, "question": "q", "A": "dog", "B": "cat", "C": "None", "answer": "B", "prediction": "B"}]
    found = read_predictions(xlsx(tmp_path / "r.xlsx", table), get_benchmark("seed"))
    assert found.samples[0].meta["choices"] == {"A": "dog", "B": "cat"}  # pandas reads None as an empty cell


@pytest.mark.parametrize("write", [xlsx, tsv])
def test_a_gold_none_is_what_pandas_reads(tmp_path, write):
    rows = [{"index": 1, "question": "q", "answer": "None", "prediction": "None"}]
    found = read_predictions(write(tmp_path / f"r.{write.__name__}", rows), get_benchmark("gqa"))
    assert (found.samples[0].prediction, found.samples[0].references) == ("nan", ("nan",))


def test_files_that_are_none(tmp_path):
    for name, content, message in [
        ("p.csv", "", r"\.jsonl, \.xlsx"),
        ("p.xlsx", "text", "no xlsx file"),
        ("p.tsv", "", "no column 'prediction'|no usable prediction"),
        ("p.json", '{"a": 1}', "does not read as a table"),
        ("p.json", '[{"index": 1}]', "no column 'prediction'"),
        ("p.jsonl", "", "no usable prediction"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path / name, DOCVQA)
    with pytest.raises(DataError, match="no prediction file"):
        read_predictions(tmp_path / "none.jsonl", DOCVQA)


def test_the_set_names_missing_and_unknown_keys(tmp_path):
    gold = [EvalSample(key=key, prediction="", references=("Lund",)) for key in ("a", "b")]
    found = join_gold(read_predictions(jsonl(tmp_path / "p.jsonl", row("a"), row("z")), DOCVQA), gold)
    assert [(sample.key, sample.prediction) for sample in found.samples] == [("a", "Lund")]
    assert found.problems == ["1 predictions missing: b", "1 keys that the dataset does not have: z (line 2)"]


def test_a_table_is_joined_by_its_index(tmp_path):
    gold = [EvalSample(key="docvqa-00000000", prediction="", references=("12",), meta={"index": "2"})]
    found = join_gold(read_predictions(xlsx(tmp_path / "r.xlsx", TABLE[:2]), DOCVQA), gold)
    assert [(a.key, a.prediction) for a in found.samples] == [("docvqa-00000000", "nan")]


def test_score_prints_scores_and_writes_reports(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", row("a"), row("b", "Lun"), row("<c>", "<script>", ("x",)))
    assert main(["score", "--benchmark=docvqa", f"--predictions={path}", f"--out={tmp_path / 'out'}", "--json"]) == 0
    output = capsys.readouterr().out
    scores = json.loads(output.splitlines()[-1])
    assert scores["num"] == 3
    assert scores["complete"] is False
    assert scores["anls"] == pytest.approx(1.75 / 3)
    assert "INCOMPLETE" in output
    assert "3 of 5,349 questions" in output
    assert "AlignVLM-Llama-3.2-1B" in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["incomplete"] == {"docvqa": ["3 of 5,349 questions"]}
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page
    assert "Incomplete" in page
    again = (tmp_path / "out/predictions/docvqa.jsonl").read_text().splitlines()
    assert json.loads(again[0])["anls@due"] == 1.0


def test_score_counts_predictions_without_references_and_odd_ones(tmp_path, capsys):
    odd = [{**row("odd", "A"), "meta": {"choices": ["dog", "cat"]}}, {"key": "bare", "prediction": "A"}]
    good = {**row("a", "A", ("A",)), "meta": {"choices": {"A": "dog", "B": "cat"}}}
    path = jsonl(tmp_path / "p.jsonl", good, *odd)
    assert main(["score", "--benchmark=seed", f"--predictions={path}", f"--out={tmp_path}", "--json"]) == 0
    output = capsys.readouterr().out
    assert "1 predictions without references: bare" in output
    assert "1 predictions cannot be scored: odd" in output
    scores = json.loads(output.splitlines()[-1])
    assert (scores["num"], scores["complete"]) == (1, False)
    whole = json.loads((tmp_path / "results.json").read_text())
    assert set(whole) == {"overall", "benchmarks", "loss", "intervals", "incomplete", "reference_prompts"}


def test_a_zip_that_is_no_workbook_is_no_xlsx_file(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "r.xlsx", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(DataError, match="no xlsx file"):
        read_predictions(tmp_path / "r.xlsx", DOCVQA)


def test_score_refuses_what_it_cannot_score(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", {"key": "a", "prediction": "x"})
    for words, message in [
        (["--benchmark=docvqs"], "did you mean 'docvqa'"),
        (["--benchmark=docvqa"], "--answers"),
        (["--benchmark=docvqa", "--rule=duo"], "--answers"),
        (["--benchmark=mmvet", "--predictions=" + str(jsonl(tmp_path / "q.jsonl", row("a")))], "judge"),
    ]:
        given = [f"--predictions={path}", *words] if len(words) == 1 or "rule" in words[-1] else words
        assert main(["score", *given]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_score_loads_no_torch(tmp_path):
    import subprocess
    import sys

    path = jsonl(tmp_path / "p.jsonl", row("a"))
    program = (
        "import sys; from alignvlm_pl.cli import main; "
        f"main(['score', '--benchmark=docvqa', '--predictions={path}']); "
        "print([m for m in ('torch', 'lightning', 'transformers', 'pandas') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


JUDGE = """
def grade(row, temperature):
    question, gold, prediction, _ = row.split(" | ")
    return "not a number" if temperature == 0 else str(float(gold == prediction))
"""


def test_a_judge_grades_open_predictions(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {**row("a"), "meta": {"category": "ocr"}},
        {**row("b", "Malmö"), "meta": {"category": "ocr,math"}},
    ]
    path = jsonl(tmp_path / "p.jsonl", *rows)
    words = ["score", "--benchmark=mmvet", f"--predictions={path}", "--json"]
    assert main([*words, "--judge=my_judge:grade"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (scores["score"], scores["math"]) == (0.5, 0.0)
    assert main([*words, "--judge=my_judge:none"]) == 1
    assert "expected module:function" in capsys.readouterr().err
