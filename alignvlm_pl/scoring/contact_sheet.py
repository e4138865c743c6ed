"""Pages with question, prediction and reference below them, and a sheet of such examples."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image, ImageDraw, ImageFont

from ..utils.atomic_files import printable
from .records import page_path

COLUMNS, CELL_WIDTH, CELL_HEIGHT, MARGIN = 3, 380, 190, 12
_RIGHT, _WRONG, _GREY = "#0a7a2f", "#b00020", "#666666"


def contact_sheet(predictions: Path, target: Path, *, per_dataset: int = 2) -> None:
    """Draw the first pages of each dataset with question, prediction (green: right, red: wrong) and reference as a PNG.

    `predictions` is the folder of `<dataset>.jsonl` and `images/<dataset>/<key>.png`.
    """
    examples = []
    for path in sorted(predictions.glob("*.jsonl")):
        name = unquote(path.stem)
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found = ((name, record, page_path(predictions / "images", name, record["key"])) for record in records)
        examples += [example for example in found if example[2].is_file()][:per_dataset]
    rows = max(-(-len(examples) // COLUMNS), 1)
    sheet = Image.new("RGB", (COLUMNS * CELL_WIDTH, rows * CELL_HEIGHT), "white")
    for index, (name, record, image) in enumerate(examples):
        cell = _cell(name, record, image)
        sheet.paste(cell, (index % COLUMNS * CELL_WIDTH, index // COLUMNS * CELL_HEIGHT))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def captioned(page: Image.Image, question: str, prediction: str, reference: str, *, right: bool) -> Image.Image:
    """Return an RGB page with three lines below it: question, prediction (green: right, red: wrong) and reference."""
    width = max(page.width, CELL_WIDTH - 2 * MARGIN)
    size = max(14, width // 60)
    font, line = ImageFont.load_default(size=size), round(1.3 * size)
    image = Image.new("RGB", (width, page.height + 6 + 3 * line), "white")
    image.paste(page)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, page.width - 1, page.height - 1), outline="#999999")
    lines = (
        (question, "black"),
        (prediction or "(nothing)", _RIGHT if right else _WRONG),
        (f"expected: {reference}", _GREY),
    )
    for number, (text, colour) in enumerate(lines):
        shown = " ".join(printable(text).split())
        while font.getlength(shown) > width:
            shown = shown[: len(shown) * 9 // 10 - 1] + "…"
        draw.text((0, page.height + 4 + number * line), shown, fill=colour, font=font)
    return image


def _cell(name: str, record: dict[str, Any], image: Path) -> Image.Image:
    page = Image.open(image).convert("RGB")
    page.thumbnail((CELL_WIDTH - 2 * MARGIN, CELL_HEIGHT - 80))
    question = record.get("question", "P_vocab reads:")
    right = bool(record.get("exact_match", float(record.get("cer", 1) == 0)))
    reference = f"{record['references'][0]}   [{name}]"
    cell = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT), "white")
    cell.paste(captioned(page, question, record["prediction"], reference, right=right), (MARGIN, MARGIN))
    return cell
