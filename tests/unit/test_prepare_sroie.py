"""Receipts become question pages and line crops; real ones too, where they are at hand."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from alignvlm_pl.errors import DataError
from datamodules.prepare.sroie import (
    ROW_HEIGHT_PX,
    TILE_HEIGHT_PX,
    TILE_WIDTH_PX,
    line_crop,
    main,
    prepare_sroie,
)
from datamodules.shards.manifest import load_manifest

REAL = Path(os.environ.get("ALIGNVLM_REAL", "../shared/real")) / "sroie"


def _receipt(folder: Path, name: str) -> None:
    page = Image.new("L", (300, 200), 200)
    ImageDraw.Draw(page).rectangle((50, 80, 149, 99), fill=20)
    page.save(folder / f"{name}.jpg")
    line = {"quad": [50, 80, 150, 80, 150, 100, 50, 100], "text": "TOTAL  9.00"}
    note = {"fields": {"total": "9.00", "date": "1 MAY 2018"}, "lines": [line]}
    (folder / f"{name}.json").write_text(json.dumps(note))


def test_pages_and_lines(tmp_path: Path) -> None:
    for name in ("000", "001", "002"):
        _receipt(tmp_path, name)
    counts = prepare_sroie(tmp_path, tmp_path / "out", train_pages=2, max_lines=10)
    assert counts == {"train_pages": 2, "test_questions": 2, "lines": 3}
    train = [json.loads(line) for line in (tmp_path / "out/pages-train.jsonl").read_text().splitlines()]
    assert [message["content"] for message in train[0]["messages"]] == [
        "<|image|>What is the total?", "9.00", "What is the date?", "1 MAY 2018",
    ]  # fmt: skip
    assert load_manifest(tmp_path / "out/lines").num_samples == 3


def test_line_lies_on_the_second_row_of_white_paper() -> None:
    page = Image.new("L", (300, 200), 200)
    ImageDraw.Draw(page).rectangle((50, 80, 149, 99), fill=20)
    crop = line_crop(page, [50, 80, 150, 80, 150, 100, 50, 100])
    assert crop.size == (TILE_WIDTH_PX, TILE_HEIGHT_PX)
    ink = crop.point(lambda value: 255 if value < 128 else 0).getbbox()
    assert ink is not None
    assert ROW_HEIGHT_PX <= ink[1] < ink[3] <= 2 * ROW_HEIGHT_PX
    assert crop.getpixel((200, TILE_HEIGHT_PX - 8)) == 255


def test_long_lines_take_more_tiles_and_never_too_many() -> None:
    page = Image.new("L", (2000, 60), 255)
    assert line_crop(page, [0, 10, 400, 10, 400, 30, 0, 30]).width == 2 * TILE_WIDTH_PX
    assert line_crop(page, [0, 10, 2000, 10, 2000, 30, 0, 30]).width == 3 * TILE_WIDTH_PX


def test_empty_folder_and_wrong_annotation_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no receipts"):
        prepare_sroie(tmp_path, tmp_path / "out")
    _receipt(tmp_path, "000")
    (tmp_path / "000.json").write_text('{"words": []}')
    with pytest.raises(DataError, match=r"000.json: expected an object .* found keys \['words'\]"):
        prepare_sroie(tmp_path, tmp_path / "out")


QUAD = [50, 80, 150, 80, 150, 100, 50, 100]


@pytest.mark.parametrize(
    "line",
    [
        *({"text": "a"}, {"quad": QUAD}, 5, None, {"text": 5, "quad": QUAD}, {"text": "a", "quad": "50"}),
        *(
            {"text": "a", "quad": quad}
            for quad in ([], QUAD[:3], [None] * 8, [*QUAD[:7], float("nan")], [*QUAD[:7], 1e9])
        ),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, line: object) -> None:
    _receipt(tmp_path, "000")
    note = json.loads((tmp_path / "000.json").read_text())
    (tmp_path / "000.json").write_text(json.dumps(note | {"lines": [*note["lines"], line]}))
    with pytest.raises(DataError, match=r"000\.json, line 1: expected `text` and `quad`"):
        prepare_sroie(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("fields", [{}, {"total": 9}, {"total": " "}, {"total": "9", "date": ["x"]}])
def test_fields_of_another_form_are_named(tmp_path: Path, fields: object) -> None:
    _receipt(tmp_path, "000")
    (tmp_path / "000.json").write_text(json.dumps({"fields": fields, "lines": []}))
    with pytest.raises(DataError, match=r"000\.json: expected texts by name as `fields`, found"):
        prepare_sroie(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real receipts: set ALIGNVLM_REAL")
def test_real_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(REAL), str(tmp_path), "--max-lines", "20"])
    counts = json.loads(capsys.readouterr().out)
    assert counts["train_pages"] == 45
    assert counts["test_questions"] >= 4 * 14
    assert counts["lines"] == 20
