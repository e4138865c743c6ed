"""A file that is not what its name or column says is called what it is, by every reader of `prepare`."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.utils.text_files import content_kind

TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "5"}]


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form)
    return buffer.getvalue()


PNG = encoded("PNG")
FILES = {
    "a PNG image": PNG,
    "a JPEG image": encoded("JPEG"),
    "a WebP image": encoded("WEBP"),
    "a HEIC image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(600),
    "a video": b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(600),
    "an SVG drawing": b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3",
    "an HTML page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
    "an image in base64": base64.b64encode(PNG),
    "a data: URL": b"data:image/png;base64," + base64.b64encode(PNG),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "gzip": b"\x1f\x8b\x08\0" + bytes(600),
}
IMAGES = ("a PNG image", "a JPEG image", "a WebP image")


@pytest.mark.parametrize("kind", FILES)
def test_every_reader_calls_a_file_what_it_is(tmp_path, capsys, kind):
    content = FILES[kind]
    assert content_kind(content[:512]).startswith(kind)
    for name in ("a.tar", "a.parquet", "list.json", "a.jsonl", "DocVQA_VAL.tsv", "images/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "images/a.txt").write_text("text")
    commands = [
        ["cc12m", "a.tar"],
        ["llava", "a.parquet"],
        ["llava", "list.json"],
        ["jsonl", "a.jsonl"],
        ["benchmark", "docvqa", "DocVQA_VAL.tsv"],
        *([["folder", "images"]] if kind not in IMAGES else []),
    ]
    for command in commands:
        words = [str(tmp_path / word) if "." in word or word == "images" else word for word in command]
        assert main(["prepare", *words, str(tmp_path / "out")]) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert kind in error, (command, error)


def test_images_that_are_no_pixels_are_read_and_named(tmp_path, capsys):
    for name, kind in (("a.svg", "an SVG drawing"), ("b.pdf", "a PDF document"), ("c.heic", "a HEIC image")):
        (tmp_path / name).write_bytes(FILES[kind])
        (tmp_path / name).with_suffix(".txt").write_text("text")
    (tmp_path / "d.png").write_bytes(PNG)
    (tmp_path / "d.txt").write_text("text")
    assert main(["prepare", "folder", str(tmp_path), str(tmp_path / "out"), "--workers", "1"]) == 0
    problems = json.loads((tmp_path / "out/report.json").read_text())["problems"]
    found = [
        (problem["reason"], re.search("bytes starting with .*?: (an? [^)]*)", problem["message"])[1])
        for problem in problems
    ]
    assert found == [("undecodable_image", kind) for kind in ("an SVG drawing", "a PDF document", "a HEIC image")]


@pytest.mark.parametrize(
    "text", ["<image>", "a,b", '{"a": 1}', "index\timage", "", "<b>5</b> apples", "PNG", "BM is a mark"]
)
def test_plain_text_is_of_no_kind(text):
    assert content_kind(text.encode()) == ""


@pytest.mark.parametrize("images", ["list<uint8>", "list<list<uint8>>", "struct"])
@pytest.mark.parametrize(
    ("command", "row"),
    [("llava", {"id": "a", "conversations": TURNS}), ("bigdocs", {"sample_id": "a", "query": "?", "annotations": "5"})],
)
def test_a_column_of_numbers_is_no_list_of_images(tmp_path, capsys, images, command, row):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    numbers = pa.list_(pa.uint8())
    cell, kind = {
        "list<uint8>": (list(PNG), numbers),
        "list<list<uint8>>": ([list(PNG)], pa.list_(numbers)),
        "struct": ({"bytes": list(PNG), "path": None}, pa.struct([("bytes", numbers), ("path", pa.string())])),
    }[images]
    columns = {name: pa.array([value]) for name, value in row.items()} | {"image": pa.array([cell], kind)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    options = ["--config", "ArxivOCR"] if command == "bigdocs" else []
    assert main(["prepare", command, str(tmp_path / "a.parquet"), str(tmp_path / "out"), *options]) == 1
    assert "column 'image' is " in (error := capsys.readouterr().err) and "uint8" in error


@pytest.mark.parametrize("cell", [base64.b64encode(PNG).decode(), "data:image/png;base64,AAAA"])
def test_a_column_of_encoded_text_is_called_so(tmp_path, capsys, cell):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": ["a"], "conversations": [TURNS], "image": [cell]}), tmp_path / "a.parquet")
    assert main(["prepare", "llava", str(tmp_path / "a.parquet"), str(tmp_path / "out")]) == 1
    assert re.search("found (an image in base64|a data: URL), to be decoded first", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "name", "text"),
    [
        (["jsonl"], "a.jsonl", '{"messages": []}\r{"messages": []}\r'),
        (["docdownstream"], "a.jsonl", '{"messages": []}\r{"messages": []}\r'),
        (["benchmark", "docvqa"], "a.tsv", "index\timage\tquestion\tanswer\r1\tx\t?\ta\r"),
    ],
)
def test_lines_that_end_with_cr_alone_are_named(tmp_path, capsys, command, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert main(["prepare", *command, str(tmp_path / name), str(tmp_path / "out")]) == 1
    assert "its lines end with CR alone, expected LF" in capsys.readouterr().err
    # As editors of Windows write them.
    (tmp_path / name).write_bytes(text.replace("\r", "\r\n").encode())
    assert main(["prepare", *command, str(tmp_path / name), str(tmp_path / "out")]) == 1
    assert "CR alone" not in capsys.readouterr().err


def test_cr_alone_in_files_that_are_read_otherwise(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(b'{"key": "a", "prediction": ""}\r{"key": "b", "prediction": ""}\r')
    assert main(["score", "--benchmark=docvqa", f"--predictions={tmp_path / 'p.jsonl'}", f"--out={tmp_path}"]) == 1
    assert "its lines end with CR alone" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["!!!!", "7"])
def test_a_short_image_cell_is_not_taken_for_an_index_that_it_is_not(tmp_path, capsys, cell):
    (tmp_path / "a.tsv").write_text(f"index\timage\tquestion\tanswer\n1\t{cell}\t?\ta\n")
    assert main(["prepare", "benchmark", "docvqa", str(tmp_path / "a.tsv"), str(tmp_path / "out")]) == 1
    expected = f"row 2: the image '{cell}' is neither an image in base64 nor the index of a row that holds one"
    assert expected in " ".join(capsys.readouterr().err.split())
