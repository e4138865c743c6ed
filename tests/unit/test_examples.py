"""The sheet of examples shows every set, and the demo's table has a row for each score."""

import json
from pathlib import Path

from PIL import Image

from alignvlm_pl.cli.demo import _table
from alignvlm_pl.scoring.contact_sheet import CELL_HEIGHT, CELL_WIDTH, COLUMNS, MARGIN, captioned, contact_sheet


def test_contact_sheet(tmp_path: Path) -> None:
    for name in ("forms", "lines"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (256, 128), 90).save(tmp_path / "images" / name / "k0.png")
        record = {
            "key": "k0",
            "question": "What?",
            "prediction": "a",
            "references": ["a"],
            "exact_match": 1.0,
        }
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({**record, "key": "k1"}) + "\n")
    contact_sheet(tmp_path, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (COLUMNS * CELL_WIDTH, CELL_HEIGHT)
    grey = [sheet.getpixel((column * CELL_WIDTH + 50, 50)) for column in range(COLUMNS)]
    assert grey == [(90, 90, 90), (90, 90, 90), (255, 255, 255)]  # two sets, one free cell


def test_a_caption_has_three_lines_within_the_width_of_the_page() -> None:
    long = "What is the total of this receipt, with all taxes and without the deposit of the bottles? " * 4
    image = captioned(Image.new("L", (500, 80), 90), long, "12 \ud83d", "13.00", right=False)
    assert image.size == (500, 80 + 6 + 3 * 18)
    assert image.getpixel((250, 40)) == (90, 90, 90)
    lines = [image.crop((0, 84 + 18 * number, 500, 102 + 18 * number)) for number in range(3)]
    assert all(line.getextrema()[1][0] < 200 for line in lines), "a line is empty"
    red, green = (band.getextrema()[0] for band in lines[1].split()[:2])
    assert green < 50 < red, "a wrong prediction is red"
    small = captioned(Image.new("RGB", (20, 20)), "q", "p", "p", right=True)
    assert small.width == CELL_WIDTH - 2 * MARGIN


def test_demo_table_has_a_row_for_each_score() -> None:
    answered = {"num": 4, "anls": 0.5, "exact_match": 0.25}
    results = {"benchmarks": {"forms": answered, "lines": {"num": 3, "cer": 0.2}}, "overall": answered}
    lines = _table(results, results).splitlines()
    assert len(lines) == 2 + 2 + 1 + 2
    assert lines[4].split() == ["lines", "3", "cer", "0.200", "0.200"]
