"""Receipts become datasets of pages and of line crops; real ones too, where they are at hand."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from alignvlm_pl.benchmarks import plain_benchmark
from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.scoring.results import results
from alignvlm_pl.scoring.run import score_samples
from datamodules.prepare.sroie import (
    ROW_HEIGHT_PX,
    TILE_HEIGHT_PX,
    TILE_WIDTH_PX,
    main,
    on_tiles,
    prepare_sroie,
    scaled_line,
)
from datamodules.shards.manifest import load_manifest
from datamodules.shards.reader import read_answers, read_range
from datamodules.shards.sample import message_text

REAL = Path(os.environ.get("ALIGNVLM_REAL", "../shared/real")) / "sroie"


def _receipt(folder: Path, name: str) -> None:
    page = Image.new("L", (300, 200), 200)
    ImageDraw.Draw(page).rectangle((50, 80, 149, 99), fill=20)
    page.save(folder / f"{name}.jpg")
    line = {"quad": [50, 80, 150, 80, 150, 100, 50, 100], "text": "TOTAL  9.00"}
    note = {"fields": {"total": "9.00", "date": "1 MAY 2018"}, "lines": [line]}
    (folder / f"{name}.json").write_text(json.dumps(note))


def _crop(page: Image.Image, quad: list[float]) -> Image.Image:
    return on_tiles(scaled_line(page, quad))


def _samples(folder: Path) -> list[dict]:
    manifest = load_manifest(folder)
    raws = read_range(manifest, 0, manifest.num_samples)
    return [json.loads(raw["json"]) | {"page": load_image(raw.get("0.jpg") or raw["0.png"])} for raw in raws]


def _texts(sample: dict) -> list[str]:
    return [message_text(turn) for turn in sample["messages"]]


def test_several_folders_become_four_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, names in ((first, ("000", "003")), (second, ("001", "002"))):
        folder.mkdir()
        for name in names:
            _receipt(folder, name)
    note = json.loads((second / "001.json").read_text())
    (second / "001.json").write_text(json.dumps(note | {"fields": {"tip": "1", "total": " ", "date": "2 MAY"}}))
    main([str(first), str(second), str(tmp_path / "out"), "--heldout", "2"])
    assert json.loads(capsys.readouterr().out) == {
        "train": 2, "heldout": 4, "lines": 2, "sheets": 1, "empty_fields": 1,
    }  # fmt: skip
    train, heldout, lines, sheets = (
        _samples(tmp_path / "out" / name) for name in ("train", "heldout", "lines", "sheets")
    )
    assert [sample["id"] for sample in train] == ["sroie/002", "sroie/003"]
    assert _texts(train[0]) == ["What is the date?", "1 MAY 2018", "What is the total?", "9.00"]
    asked = [(sample["id"], _texts(sample)[0], sample["references"], sample["meta"]["group"]) for sample in heldout]
    assert asked == [
        ("sroie/000/date", "What is the date?", ["1 MAY 2018"], "date"),
        ("sroie/000/total", "What is the total?", ["9.00"], "total"),
        ("sroie/001/date", "What is the date?", ["2 MAY"], "date"),
        ("sroie/001/tip", "What is the tip?", ["1"], "tip"),
    ]
    assert [sample["id"] for sample in lines + sheets] == ["sroie/000", "sroie/001", "sroie/002+sroie/003"]


@pytest.mark.parametrize("width", [0, 240])
def test_boxes_of_lines_lie_on_the_ink_of_the_stored_page(tmp_path: Path, width: int) -> None:
    _receipt(tmp_path, "000")
    prepare_sroie([tmp_path], tmp_path / "out", heldout=0, width=width)
    (sample,) = _samples(tmp_path / "out/train")
    assert sample["page"].width == (width or 300)
    assert sample["page"].size == (sample["images"][0]["w"], sample["images"][0]["h"])
    ink = sample["page"].convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    (line,) = sample["lines"]
    assert line["text"] == "TOTAL 9.00"
    assert line["box"] == pytest.approx(ink, abs=2)
    if not width:
        stored = load_manifest(tmp_path / "out/train")
        (raw,) = read_range(stored, 0, 1)
        assert raw["0.jpg"] == (tmp_path / "000.jpg").read_bytes()


def test_scores_are_reported_by_field(tmp_path: Path) -> None:
    _receipt(tmp_path, "000")
    prepare_sroie([tmp_path], tmp_path / "out")
    gold = read_answers(tmp_path / "out/heldout")
    answered = [replace(one, prediction="9.00") for one in gold]
    found = score_samples(plain_benchmark("receipts", metrics=("exact_match",)), answered)
    assert found.metrics == {"exact_match": 0.5, "exact_match/date": 0.0, "exact_match/total": 1.0}
    assert results({"receipts": found})["overall"] == {"num": 2, "exact_match": 0.5}


def test_receipts_of_one_name_and_a_dataset_that_would_be_stale_are_named(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        _receipt(tmp_path / folder, "007")
    _receipt(tmp_path / "b", "008")
    roots, out = [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    with pytest.raises(DataError, match=r"a/007.jpg and .*b/007.jpg: two receipts of the name '007'; rename one"):
        prepare_sroie(roots, out)
    prepare_sroie(roots[1:], out, heldout=1)
    with pytest.raises(DataError, match=r"out/train has an earlier dataset, and no receipt is left for it; delete it"):
        prepare_sroie(roots[1:], out)


def test_the_former_option_names_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--train-pages was removed: .* --heldout"):
        main([str(tmp_path), str(tmp_path), "--train-pages", "45"])


def test_line_lies_on_the_second_row_of_white_paper() -> None:
    page = Image.new("L", (300, 200), 200)
    ImageDraw.Draw(page).rectangle((50, 80, 149, 99), fill=20)
    crop = _crop(page, [50, 80, 150, 80, 150, 100, 50, 100])
    assert crop.size == (TILE_WIDTH_PX, TILE_HEIGHT_PX)
    ink = crop.point(lambda value: 255 if value < 128 else 0).getbbox()
    assert ink is not None
    assert ROW_HEIGHT_PX <= ink[1] < ink[3] <= 2 * ROW_HEIGHT_PX
    assert crop.getpixel((200, TILE_HEIGHT_PX - 8)) == 255


def test_long_lines_take_more_tiles_and_never_too_many() -> None:
    page = Image.new("L", (2000, 60), 255)
    assert _crop(page, [0, 10, 400, 10, 400, 30, 0, 30]).width == 2 * TILE_WIDTH_PX
    assert _crop(page, [0, 10, 2000, 10, 2000, 30, 0, 30]).width == 3 * TILE_WIDTH_PX


def test_a_sheet_is_full_before_the_next_and_its_boxes_lie_on_the_ink(tmp_path: Path) -> None:
    _receipt(tmp_path, "000")
    note = json.loads((tmp_path / "000.json").read_text())
    note["lines"] = [note["lines"][0] | {"text": f"line {number}"} for number in range(150)]
    (tmp_path / "000.json").write_text(json.dumps(note))
    counts = prepare_sroie([tmp_path], tmp_path / "out", heldout=0)
    assert counts["sheets"] == 2
    first, second = _samples(tmp_path / "out/sheets")
    assert [line["text"] for line in first["lines"] + second["lines"]] == [f"line {n}" for n in range(150)]
    assert len(first["lines"]) == 24 * 5  # a line of 100 px is 116 px wide on the sheet
    assert _texts(first)[1].splitlines()[-1] == "line 119"
    for line in (first["lines"][0], first["lines"][63], second["lines"][-1]):
        x0, y0, x1, y1 = line["box"]
        assert y0 % ROW_HEIGHT_PX == 0 and y1 - y0 == ROW_HEIGHT_PX
        ink = first["page"].convert("L").crop(line["box"]).point(lambda value: 255 * (value < 128)).getbbox()
        assert ink == pytest.approx((3, 5, x1 - x0 - 3, 27), abs=2)


def test_empty_folder_and_wrong_annotation_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no receipts"):
        prepare_sroie([tmp_path], tmp_path / "out")
    _receipt(tmp_path, "000")
    (tmp_path / "000.json").write_text('{"words": []}')
    with pytest.raises(DataError, match=r"000.json: expected an object .* found keys \['words'\]"):
        prepare_sroie([tmp_path], tmp_path / "out")


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
        prepare_sroie([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("fields", [{}, {"total": 9}, {"total": " "}, {"total": "9", "date": ["x"]}])
def test_fields_of_another_form_are_named(tmp_path: Path, fields: object) -> None:
    _receipt(tmp_path, "000")
    (tmp_path / "000.json").write_text(json.dumps({"fields": fields, "lines": []}))
    with pytest.raises(DataError, match=r"000\.json: expected texts by name as `fields`, found"):
        prepare_sroie([tmp_path], tmp_path / "out")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real receipts: set ALIGNVLM_REAL")
def test_real_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted(REAL.iterdir())[:8]:
        (tmp_path / file.name).symlink_to(file.absolute())
    main([str(tmp_path), str(tmp_path / "out"), "--max-lines", "20", "--heldout", "3"])
    counts = json.loads(capsys.readouterr().out)
    assert counts == {"train": 1, "heldout": 12, "lines": 20, "sheets": 1, "empty_fields": 0}
    for sample in _samples(tmp_path / "out/heldout"):
        assert sample["page"].width == 768
        edges = [edge for line in sample["lines"] for edge in line["box"][::2]]
        assert -8 <= min(edges) < max(edges) <= 776  # some quads are a little wider than the paper
