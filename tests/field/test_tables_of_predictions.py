"""Cells of benchmark and result tables as other tools write them: base64 in lines, other sheets, dates.

Source: open-compass/VLMEvalKit, whose own readers take wrapped base64 and which pandas reads the tables for.
"""

import base64
import datetime
import io

import pytest
from PIL import Image

from alignvlm_pl.benchmarks import get_benchmark
from alignvlm_pl.scoring.files import read_predictions
from datamodules.prepare import main as prepare
from datamodules.shards.manifest import load_manifest

openpyxl = pytest.importorskip("openpyxl")
DOCVQA = get_benchmark("docvqa")


def image():
    # Its base64 has `+`, `/` and padding.
    buffer = io.BytesIO()
    Image.effect_noise((19, 16), 90).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return data + bytes(1 - len(data) % 3 % 2)


def test_base64_in_lines_url_safe_unpadded_and_as_a_url(tmp_path):
    data = image()
    plain = base64.b64encode(data).decode()
    cells = {
        "plain": plain,
        "lines": '"' + base64.encodebytes(data).decode() + '"',
        "URL-safe": base64.urlsafe_b64encode(data).decode(),
        "unpadded": plain.rstrip("="),
        "URL": f"data:image/png;base64,{plain}",
    }
    rows = [f"{number}\t{cell}\tWhat?\tyes" for number, cell in enumerate(cells.values())]
    rows = ["index\timage\tquestion\tanswer", *rows, f"9\t!!{plain}\t?\ty"]
    (tmp_path / "DocVQA_VAL.TSV").write_text("\n".join(rows))
    assert prepare(["benchmark", "docvqa", str(tmp_path / "DocVQA_VAL.TSV"), str(tmp_path / "out")]) == 0
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.num_samples, manifest.extra["skipped"]) == (len(cells), {"bad_base64": 1})


def workbook(path, *sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


HEADER = ["index", "question", "answer", "prediction"]


def test_the_sheet_and_the_header_with_predictions_are_found(tmp_path):
    notes = ("notes", [["made by", "somebody"], [None, 3]])
    rows = [["A title"], [], HEADER, [1, "?", "yes", "yes"], [2, "?", "no", "yes"]]
    found = read_predictions(workbook(tmp_path / "p.XLSX", notes, ("results", rows)), DOCVQA)
    assert [(sample.key, sample.prediction, sample.references) for sample in found.samples] == [
        ("1", "yes", ("yes",)),
        ("2", "yes", ("no",)),
    ]
    assert found.places == {"1": "row 4", "2": "row 5"} and found.problems == found.notes == []


def test_cells_that_a_spreadsheet_has_changed_are_noted(tmp_path):
    values = [
        datetime.datetime(2024, 2, 3),
        datetime.datetime(2024, 2, 4),
        datetime.time(10, 30),
        True,
        "text",
        12,
        1.5,
    ]
    rows = [HEADER, *([number, "?", "yes", value] for number, value in enumerate(values))]
    found = read_predictions(workbook(tmp_path / "p.xlsx", ("results", rows)), DOCVQA)
    assert [sample.prediction for sample in found.samples][:4] == [
        "2024-02-03 00:00:00",
        "2024-02-04 00:00:00",
        "10:30:00",
        "True",
    ]
    what = "in the spreadsheet, and are scored as such: "
    assert found.notes == [
        f"2 predictions are cells of type datetime {what}'2024-02-03 00:00:00'",
        f"1 predictions are cells of type time {what}'10:30:00'",
        f"1 predictions are cells of type bool {what}'True'",
    ]
