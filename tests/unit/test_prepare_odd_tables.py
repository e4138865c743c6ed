"""Invalid rows of table datasets: each is counted and named with its line, and the run continues."""

import json
from pathlib import Path

import pytest

from alignvlm_pl.errors import DataError
from datamodules.prepare.rendered_tables.tabfact import FactTables
from datamodules.prepare.rendered_tables.table_questions import TableQuestion, read_bigdocs_rows
from datamodules.prepare.rendered_tables.wtq import WikiTables
from datamodules.shards.sample import SampleError
from datamodules.shards.skipped_rows import SkippedRows, read_skipped_rows

GOOD = {"id": "nu-0", "question": "who?", "context": "csv/203-csv/1.csv", "answers": ["Ada", "Bob"]}
FACT = {"table": "1.csv", "statement": "it be", "label": 1, "caption": ""}


def lines(path: Path, *rows: object) -> Path:
    content = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in content))
    return path


def texts(found: list[TableQuestion | SampleError]) -> list[str]:
    """Names of the questions, and reason and place of the errors."""
    return [
        f"{one.reason} {str(one).split('jsonl, ')[1].split(':')[0]}" if isinstance(one, SampleError) else one.name
        for one in found
    ]


ODD_QUESTIONS = [
    (b"{broken", "bad_json"),
    (b"[" * 100_000, "bad_json"),
    (b'{"id": "caf\xe9"}', "bad_json"),
    (b"[1]", "bad_json"),
    ({"question": "who?"}, "bad_row"),
    ({**GOOD, "id": 5}, "bad_row"),
    ({**GOOD, "id": "x", "context": 5}, "bad_row"),
    ({**GOOD, "id": "x", "context": ["csv/1.csv"]}, "bad_row"),
    ({**GOOD, "id": "x", "question": None}, "bad_row"),
    ({**GOOD, "id": "x", "question": "\ud83d"}, "bad_row"),
    ({**GOOD, "id": "x", "answers": [5]}, "bad_row"),
    ({**GOOD, "id": "x", "answers": ["a", None]}, "bad_row"),
    ({**GOOD, "id": "x", "answers": "abc"}, "bad_row"),
    ({**GOOD, "id": "x", "answers": []}, "no_answer"),
    ({**GOOD, "id": "x", "answers": ["", " "]}, "no_answer"),
    (GOOD, "repeated_id"),
]


def test_odd_questions(tmp_path):
    lines(tmp_path / "questions.jsonl", GOOD, *(row for row, _ in ODD_QUESTIONS), {**GOOD, "id": "nu-1"})
    expected = [f"{reason} line {number}" for number, (_, reason) in enumerate(ODD_QUESTIONS, start=2)]
    assert texts(list(WikiTables(folder=tmp_path).questions("test"))) == ["nu-0", *expected, "nu-1"]


def test_odd_lines_of_the_release(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "tagged" / "data").mkdir(parents=True)
    path = tmp_path / "data" / "pristine-unseen-tables.tsv"
    rows = [
        b"\xef\xbb\xbfid\tutterance\tcontext\ttargetValue",
        b"a\tq\tc\tx",
        b"a\tq\tc\tx",
        b"b\t\tc\tx",
        b"c\tq\tc\t",
    ]
    path.write_bytes(b"\n".join([*rows, b"d\tq\xe9\tc\tx", b"e\tq\tc\tx|y"]))
    tagged = tmp_path / "tagged" / "data" / "pristine-unseen-tables.tagged"
    tagged.write_text("id\ttargetCanon\na\t\ne\t1.0|2.0\n")
    first, *odd, last = WikiTables(folder=tmp_path).questions("test")
    assert [error.reason for error in odd] == ["repeated_id", "bad_row", "no_answer", "bad_row"]
    assert "tables.tsv, line 3: id 'a' is that of an earlier question" in str(odd[0])
    assert (first.meta, last.meta) == ({}, {"canonical": ["1.0", "2.0"]})
    tagged.write_text("name\ttargetCanon\na\tx\n")
    with pytest.raises(DataError, match="does not read as a tagged file"):
        list(WikiTables(folder=tmp_path).questions("test"))


ODD_STATEMENTS = [
    (b"{broken", "bad_json"),
    ({"table": "1.csv"}, "bad_row"),
    ({**FACT, "table": ["1.csv"]}, "bad_row"),
    ({**FACT, "label": [1]}, "bad_row"),
    ({**FACT, "label": True}, "bad_row"),
    ({**FACT, "label": 7}, "bad_row"),
    ({**FACT, "statement": 5}, "bad_row"),
    ({**FACT, "statement": " "}, "bad_row"),
    ({**FACT, "caption": 5}, "bad_row"),
]


def test_odd_statements(tmp_path):
    lines(tmp_path / "statements.jsonl", FACT, *(row for row, _ in ODD_STATEMENTS), FACT)
    release = FactTables(folder=tmp_path)
    expected = [f"{reason} line {number}" for number, (_, reason) in enumerate(ODD_STATEMENTS, start=2)]
    assert texts(list(release.questions("test"))) == ["1.csv/0", *expected, "1.csv/1"]
    assert release.captions == {"1.csv": ""}


def test_odd_entries_of_the_release(tmp_path):
    (tmp_path / "tokenized_data").mkdir()
    path = tmp_path / "tokenized_data" / "test_examples.json"
    entries = {
        "a": [["s", 5], [1, 0], "c"],
        "b": [["s"], [1, 0], "c"],
        "d": 5,
        "e": ["s"],
        "f": [["s"], [0], "c"],
    }
    path.write_text(json.dumps(entries)[:-1] + ', "a": [["t"], [1], "c"]}')  # a table twice
    found = list(FactTables(folder=tmp_path).questions("test"))
    assert [one.name for one in found if isinstance(one, TableQuestion)] == ["a/0", "f/0"]
    reasons = [one.reason for one in found if isinstance(one, SampleError)]
    assert reasons == ["bad_row"] * 4 + ["repeated_table"]
    for content in ("5", "[1", '{"a"}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(DataError, match="does not read as statements"):
            list(FactTables(folder=tmp_path).questions("test"))


def test_odd_bigdocs_rows(tmp_path):
    good = {"img_id": "1.csv", "query": ["q"], "annotations": ["a"]}
    rows = [
        (b"5", "bad_json"),
        ({**good, "img_id": 1}, "bad_row"),
        ({**good, "query": None}, "bad_row"),
        ({**good, "annotations": [None]}, "bad_row"),
        ({**good, "query": [], "annotations": []}, "bad_row"),
        ({**good, "annotations": ["a", "b"]}, "unknown_table"),
    ]
    path = lines(tmp_path / "rows.jsonl", good, *(row for row, _ in rows), good)
    expected = [f"{reason} line {number}" for number, (_, reason) in enumerate(rows, start=2)]
    assert texts(list(read_bigdocs_rows(path, ["1.csv"]))) == ["1/0", *expected, "1/1"]


@pytest.mark.parametrize("release", [WikiTables, FactTables])
@pytest.mark.parametrize("name", ["none", "nul\0", "long" * 200])
def test_names_of_tables_that_no_file_can_have(tmp_path, release, name):
    with pytest.raises(SampleError, match="does not read"):
        release(folder=tmp_path).load(name)


def test_all_that_is_skipped_is_in_a_file(tmp_path):
    skipped = SkippedRows()
    for number in range(12):
        skipped.skip(SampleError(f"line {number}", "bad_row"), 2)
    assert skipped.extra()["skipped"] == {"bad_row": 24}
    assert len(skipped.extra()["skipped_first"]["bad_row"]) == 5
    skipped.write(tmp_path)
    assert read_skipped_rows(tmp_path) == {"bad_row": [f"line {number}" for number in range(12)]}
    assert read_skipped_rows(tmp_path / "none") == {}
