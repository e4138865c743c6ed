"""Tables as pages: nothing is lost, escaped, deterministic; questions of the two releases, real ones where they are."""

import json
import os
import random
import re
from pathlib import Path

import pytest
from PIL import ImageFile

from alignvlm_pl.cli import main
from datamodules.prepare.rendered_tables.table_questions import TableNames, TableQuestion
from datamodules.prepare.rendered_tables.tables import (
    PAGE_HEIGHT_PX,
    PAGE_WIDTH_PX,
    RenderedCell,
    Table,
    check_size,
    missing_cells,
    render_table,
    to_png,
)
from datamodules.prepare.rendered_tables.wtq import WikiTables, unescape
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_range
from datamodules.shards.sample import SampleError

REAL = Path(os.environ.get("ALIGNVLM_REAL", Path(__file__).parents[3] / "shared" / "real"))


def renderer_is_there() -> bool:
    from alignvlm_pl.errors import ConfigError
    from datamodules.prepare.rendered_tables.tables import renderers

    try:
        renderers()
    except ConfigError:
        return False
    return True


needs_renderer = pytest.mark.skipif(not renderer_is_there(), reason="weasyprint, pango or pypdfium2 is not installed")


def grid(rows: int, columns: int) -> list[list[str]]:
    rng = random.Random(rows * columns)
    header = [f"col{number}" for number in range(columns)]
    return [header, *([f"{rng.randrange(10**6)}" for _ in range(columns)] for _ in range(rows))]


@needs_renderer
@pytest.mark.parametrize(
    ("markup", "problem"),
    [
        ("<table><tr><td colspan=1000000000>a<td>b</table>", "a colspan of 1000000000, expected at most 1000"),
        ("<table><tr><td colspan='&#49;001'>a<td>b</table>", "a colspan of 1001, expected at most 1000"),
        (f"<table><tr><th rowspan=' {'9' * 5000}'>a<td>b</table>", "a rowspan of 99999999999999999999, expected"),
        ("<table><colgroup span=1000000><tr><td>a<td>b</table>", "a span of 1000000, expected at most 1000"),
        ("<table><col span=1000001><tr><td>a<td>b</table>", "a span of 1000001, expected at most 1000"),
        ("<table>" + "<tr><td colspan=1000>a<td>b" * 60 + "</table>", "more than 50000 cells"),
        ("<table><tr><td>" * 3000 + "a<td>b" + "</table>" * 3000, "nested more than 200 elements deep"),
        ("<table><tr><td>" + "<div>" * 30000 + "a<td>b</table>", "nested more than 200 elements deep"),
        ("<table><tr><td>" * 60 + "a<td>b" + "</table>" * 60, "nested too deep"),
    ],
)
def test_a_table_that_would_not_end_is_skipped(markup, problem):
    with pytest.raises(SampleError, match=f"table t is too large to lay out: {problem}") as caught:
        render_table(Table(name="t", rows=[["a", "b"]], markup=markup))
    assert caught.value.reason == "too_large"


def test_many_cells_and_open_tags_are_no_excess():
    markup = "<table>" + "<tr><td>a<td>b<p>c<br>" * 5000 + "<tr><td colspan=1000 rowspan=65534><b>x</b></table>"
    check_size(Table(name="t", rows=[["a"] * 10] * 5000, markup=markup))
    with pytest.raises(SampleError, match="too large to lay out: 50010 cells, expected at most 50000"):
        check_size(Table(name="t", rows=[["a"] * 10] * 5001))


def test_a_name_that_two_tables_end_with_is_not_guessed():
    names = TableNames.from_names(["203-csv/7", "204-csv/7", "204-csv/8"])
    assert names.find("csv/203-csv/7.csv") == "203-csv/7"
    assert names.find("8.html") == "204-csv/8"
    assert names.find("7") is None


@needs_renderer
@pytest.mark.slow
def test_long_tables_get_several_pages():
    pages = render_table(Table(name="long", rows=grid(300, 4), caption="A long one"))  # raises where a cell is lost
    assert len(pages) > 4
    assert all(page.height <= PAGE_HEIGHT_PX for page in pages)
    # The header row is on every page: the darker band of its background at the top.
    bands = [page.crop((0, 0, 60, 60)).getcolors(100_000) for page in pages[1:]]
    assert all(any(color == (234, 236, 240) for _, color in band) for band in bands)


@needs_renderer
@pytest.mark.slow
def test_wide_tables_get_a_wider_page():
    (page,) = render_table(Table(name="wide", rows=grid(3, 40)))
    assert page.width > 2 * PAGE_WIDTH_PX
    right = page.crop((page.width - 40, 0, page.width, page.height)).convert("L").getextrema()
    assert right[0] < 200  # the last column's border, not a cut edge of white
    assert page.getpixel((page.width - 1, page.height // 2)) == (255, 255, 255)


@needs_renderer
def test_a_table_that_outgrows_every_page_is_refused():
    markup = '<table style="width:150%"><tr><td>a</td><td>b</td></tr></table>'
    with pytest.raises(SampleError, match="does not fit a page of any tried width"):
        render_table(Table(name="t", rows=[["a", "b"]], markup=markup))


@needs_renderer
def test_text_is_escaped_and_pages_are_the_same_again():
    rows = [
        ["<b>head", "a & b"],
        ["<script>alert(1)</script>", "ﬁne Ünïcødé"],
        ["", "“quoted”\nin two lines"],
    ]
    table = Table(name="odd", rows=rows, caption="<i>caption")
    assert "<script>" not in table.to_html()
    assert to_png(render_table(table)[0]) == to_png(render_table(table)[0])


@needs_renderer
def test_what_is_not_drawn_is_noticed():
    rows = [["shown", "gone"]]
    with pytest.raises(SampleError, match="1 cells are not on its pages, the first is 'gone'"):
        render_table(Table(name="t", rows=rows, markup="<table><tr><td>shown</td></tr></table>"))
    with pytest.raises(SampleError, match="is empty"):
        render_table(Table(name="t", rows=[["", " "]]))
    table = Table(name="t", rows=[["Foo bar", "–", "x9"]])
    cells = [RenderedCell(text=text) for text in ("foo\n BAR", "–", "x9")]
    assert missing_cells(table, cells, "FOO BAR x9") == []
    assert missing_cells(table, cells[:2], "FOO BAR x9") == ["x9"]
    assert missing_cells(table, cells, "FOO BAR x") == ["9"]  # it has a box, but its text is not there
    assert missing_cells(Table(name="t", rows=[["12"], ["2"]]), [RenderedCell(text="12")], "12") == ["2"]


HIDDEN = '<tr style="display:none"><td>{}</td><td>{}</td></tr>'


@needs_renderer
@pytest.mark.parametrize(
    ("hidden", "lost"),
    [(("12", "x"), "12"), (("123", "x"), "123"), (("+", "–"), "–"), (("12", "123"), "123")],
)
def test_rows_that_the_markup_hides_are_noticed_beside_others_like_them(hidden, lost):
    shown = [["n", "x"], ["123", "x"], ["–[1]", "x"]]
    lines = "".join(f"<tr><td>{one}</td><td>{two}</td></tr>" for one, two in shown)
    rows = [*shown[:2], ["–", "x"]]
    assert len(render_table(Table(name="t", rows=rows, markup=f"<table>{lines}</table>"))) == 1  # a note is no loss
    markup = f"<table>{lines}{HIDDEN.format(*hidden)}</table>"
    with pytest.raises(SampleError, match=rf"2 cells are not on its pages, the first is '{re.escape(lost)}'"):
        render_table(Table(name="t", rows=[*rows, list(hidden)], markup=markup))


@needs_renderer
def test_equal_rows_are_counted_and_spans_stand_for_their_rows():
    more = "<tr><td>1</td></tr>"
    spanned = f'<table><tr><td rowspan="3">a</td><td colspan="x">1</td></tr>{more}{more}</table>'
    assert len(render_table(Table(name="t", rows=[["a", "1"]] * 3, markup=spanned))) == 1
    with pytest.raises(SampleError, match="1 cells are not on its pages, the first is '1'"):
        render_table(Table(name="t", rows=[["a", "1"]] * 4, markup=spanned.replace('"3"', '"9"')))
    joined = "<table><tr><td colspan=2>Chart</td></tr><tr><td>US</td><td>UK</td></tr></table>"
    assert len(render_table(Table(name="t", rows=[["Chart\nUS", "Chart\nUK"]], markup=joined))) == 1
    with pytest.raises(SampleError, match="1 cells are not on its pages"):
        render_table(Table(name="t", rows=[["Chart\nUS", "Chart\nFR"]], markup=joined))


@needs_renderer
def test_nothing_is_fetched_and_pillow_stays_strict(tmp_path):
    secret = tmp_path / "secret.css"
    secret.write_text("td { display: none }")
    markup = f'<link rel="stylesheet" href="{secret.as_uri()}"><table><tr><td>a<img src="https://x.invalid/y.png"></td></tr></table>'
    assert len(render_table(Table(name="t", rows=[["a"]], markup=markup))) == 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_releases_own_escapes():
    assert unescape(r"a\pb\nc\\n") == "a|b\nc\\n"


def release(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "tagged" / "data").mkdir(parents=True)
    (folder / "csv" / "203-csv").mkdir(parents=True)
    lines = [
        "id\tutterance\tcontext\ttargetValue",
        "nu-0\twho won?\tcsv/203-csv/1.csv\tAda\\pB|Bob",
        "nu-1\tbroken",
        "nu-2\thow many?\tcsv/203-csv/1.csv\t1,000",
        "nu-3\twhere?\tcsv/203-csv/9.csv\tLund",
    ]
    (folder / "data" / "pristine-unseen-tables.tsv").write_text("\n".join(lines) + "\n")
    tagged = ["id\ttargetCanon", "nu-0\tAda\\pB|Bob", "nu-2\t1000.0"]
    (folder / "tagged/data/pristine-unseen-tables.tagged").write_text("\n".join(tagged) + "\n")
    (folder / "csv/203-csv/1.csv").write_text('"Name","Count"\n"Ada \\"A\\"","1,000"\n"Bob",""\n')
    return folder


def test_questions_of_the_release(tmp_path):
    found = list(WikiTables(folder=release(tmp_path / "wtq")).questions("test"))
    assert found[0] == TableQuestion(
        name="nu-0",
        table="203-csv/1",
        text="who won?",
        references=("Ada|B", "Bob"),
        meta={"canonical": ["Ada|B", "Bob"]},
    )
    assert isinstance(found[1], SampleError)
    assert found[2].meta == {"canonical": ["1000.0"]}
    table = WikiTables(folder=tmp_path / "wtq").load("203-csv/1")
    assert table.rows == [["Name", "Count"], ['Ada "A"', "1,000"], ["Bob", ""]]


def records(folder: Path) -> list[dict]:
    manifest = load_manifest(folder)
    return [json.loads(raw["json"]) for raw in read_range(manifest, 0, manifest.num_samples)]


@needs_renderer
@pytest.mark.slow
def test_prepare_wtq_counts_what_it_leaves_out(tmp_path, capsys):
    folder = release(tmp_path / "wtq")
    assert main(["prepare", "wtq", str(folder), str(tmp_path / "set"), "--workers", "2"]) == 0
    found = records(tmp_path / "set")
    assert [record["references"] for record in found] == [["Ada|B", "Bob"], ["1,000"]]
    assert found[1]["meta"] == {"table": "203-csv/1", "index": "nu-2", "canonical": ["1000.0"]}
    manifest = load_manifest(tmp_path / "set")
    assert manifest.extra["skipped"] == {"bad_row": 1, "unreadable_table": 1}
    assert manifest.extra["benchmark"] == "wtq"
    assert main(["prepare", "wtq", str(folder), str(tmp_path / "turns"), "--conversations"]) == 0
    (record,) = records(tmp_path / "turns")
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"] * 2
    assert main(["prepare", "wtq", str(tmp_path), str(tmp_path / "no")]) == 1
    assert "fetch the release from https://" in capsys.readouterr().err


@needs_renderer
@pytest.mark.slow
def test_bigdocs_rows_get_the_tables_they_name(tmp_path):
    folder = release(tmp_path / "wtq")
    rows = [
        {"img_id": "csv/203-csv/1.csv", "query": ["who?", "how many?"], "annotations": ["Ada", "2"]},
        {"img_id": "1.png", "query": "one?", "annotations": "yes"},
        {"img_id": "77", "query": "q", "annotations": "a"},
        {"sample_id": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", "wtq", str(folder), str(tmp_path / "set"), "--bigdocs", str(tmp_path / "rows.jsonl")]
    assert main(words) == 0
    assert [record["references"] for record in records(tmp_path / "set")] == [["Ada"], ["2"], ["yes"]]
    extra = load_manifest(tmp_path / "set").extra
    assert extra["skipped"] == {"bad_row": 1, "unknown_table": 1}
    assert "benchmark" not in extra


@needs_renderer
@pytest.mark.slow
def test_prepare_tabfact(tmp_path, capsys):
    (tmp_path / "tokenized_data").mkdir()
    (tmp_path / "data" / "all_csv").mkdir(parents=True)
    (tmp_path / "data/all_csv/1.html.csv").write_text("year#team\n2001#lund\n")
    examples = {"1.html.csv": [["lund be in 2001", "malmö be there", "x"], [1, 0, 7], "a season"]}
    path = tmp_path / "tokenized_data" / "test_examples.json"
    path.write_text(json.dumps(examples))
    assert main(["prepare", "tabfact", str(tmp_path), str(tmp_path / "set")]) == 0
    assert [record["references"] for record in records(tmp_path / "set")] == [["True"], ["False"]]
    assert load_manifest(tmp_path / "set").extra["skipped"] == {"bad_row": 1}
    path.write_text("[1")
    assert main(["prepare", "tabfact", str(tmp_path), str(tmp_path / "no")]) == 1
    assert "does not read as statements" in capsys.readouterr().err


@needs_renderer
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "wtq").is_dir(), reason="no real tables: set ALIGNVLM_REAL")
def test_the_longest_and_widest_real_tables_lose_nothing():
    tables = [WikiTables(folder=REAL / "wtq", html=html).load(name) for name in _extremes() for html in (True, False)]
    assert all(len(render_table(table)) >= 1 for table in tables)
    assert max(len(table.rows) for table in tables) > 100


def _extremes() -> list[str]:
    texts = {path: path.read_bytes() for path in sorted((REAL / "wtq" / "csv").glob("*/*.csv"))}
    longest = max(texts, key=lambda path: texts[path].count(b"\n"))
    widest = max(texts, key=lambda path: texts[path].partition(b"\n")[0].count(b'","'))
    return [f"{path.parent.name}/{path.stem}" for path in dict.fromkeys([longest, widest])]
