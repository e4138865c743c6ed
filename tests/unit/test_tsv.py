"""Tables whose rows do not all read: each bad one is named, the others stay."""

import csv
import tracemalloc
from pathlib import Path

import pytest

from alignvlm_pl.scoring.tsv import TabTable

HEADER = b"index\timage\tquestion\n"


def read(path: Path, content: bytes) -> list[tuple[int, str, str]]:
    path.write_bytes(content)
    return [(row.number, row.cells.get("index", ""), row.problem) for row in TabTable(path).rows()]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_quote_that_is_not_closed_takes_its_own_row_alone(tmp_path, position):
    lines = [f"{n}\tpicture\tquestion {n}\n".encode() for n in range(4)]
    lines[position] = lines[position].replace(b"\tquestion", b'\t"question')
    found = read(tmp_path / "t.tsv", HEADER + b"".join(lines))
    assert [number for number, _, _ in found] == [2, 3, 4, 5]
    assert [index for _, index, _ in found] == [str(n) if n != position else "" for n in range(4)]
    assert "not closed" in found[position][2]


def test_quotes_of_the_next_row_do_not_close_those_of_another(tmp_path):
    body = b'1\tx\tx\n2\t"q\tx\n3\t"def"\tx\n4\t"a"" \n\tb\tc\td\n"\tYork\n"5" b\tx\tx\n6\tx\t"end\n'
    found = read(tmp_path / "t.tsv", HEADER + body)
    assert [(number, index) for number, index, _ in found] == [
        (2, "1"),
        (3, ""),
        (4, "3"),
        (5, "4"),
        (6, "5 b"),
        (7, ""),
    ]
    assert "not closed" in found[1][2]
    assert "not closed" in found[5][2]  # the file ends inside
    cells = list(TabTable(tmp_path / "t.tsv").rows())[3].cells
    # Continuation lines may hold as many tabs as the table has columns.
    assert cells == {"index": "4", "image": 'a" \n\tb\tc\td\n', "question": "York"}


def test_a_quote_that_is_not_closed_is_not_followed_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("alignvlm_pl.scoring.tsv.MAX_CONTINUED", 10_000)
    path = tmp_path / "t.tsv"
    path.write_bytes(HEADER + b'1\tx\t"open\n' + b"".join(b"%d\tx\tq\n" % n for n in range(2, 50_000)))
    rows = TabTable(path).rows()
    tracemalloc.start()
    first = next(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "not closed" in first.problem
    assert peak < 300_000 < path.stat().st_size
    assert [row.cells["index"] for row in rows] == [str(n) for n in range(2, 50_000)]
    path.write_bytes(b'"index\t' + b"x" * 20_000 + b"\n" * 20_000)
    assert TabTable(path).header == []


def test_cells_of_several_lines_with_tabs_are_whole(tmp_path):
    rows = [{"index": str(n), "image": "x", "question": 'a\tb\n"two" lines\t'} for n in range(3)]
    path = tmp_path / "t.tsv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    table = TabTable(path)
    found = list(table.rows())
    assert [row.cells for row in found] == rows
    assert next(table.rows(found[1].offset)).cells == rows[1]


def test_bytes_and_columns_spoil_their_own_row(tmp_path):
    body = b"1\tx\tcaf\xe9\n2\tx\n\n3\tx\tcaf\xc3\xa9\n4\tx\ty\tz\n"
    found = read(tmp_path / "t.tsv", b"\xef\xbb\xbf" + HEADER + body)
    assert found == [
        (2, "", "not UTF-8"),
        (3, "", "expected 3 columns, found 2"),
        (5, "3", ""),
        (6, "", "expected 3 columns, found 4"),
    ]
