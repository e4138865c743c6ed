"""A sheet of examples: page, question, prediction and reference, from the files that an evaluation wrote."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..scoring.records import page_path

COLUMNS, CELL_WIDTH, CELL_HEIGHT, MARGIN = 3, 380, 190, 12


def contact_sheet(predictions: Path, target: Path, *, per_dataset: int = 2) -> None:
    """Draw the first page images of each dataset with question, prediction (green: right, red: wrong) and reference.

    Args:
        predictions: Folder of `<dataset>.jsonl` and `images/<dataset>/<key>.png`.
        target: PNG to write.
        per_dataset: Examples of each dataset.
    """
    examples = [
        (path.stem, r, image) for path in sorted(predictions.glob("*.jsonl")) for r, image in _first(path, per_dataset)
    ]
    rows = max(-(-len(examples) // COLUMNS), 1)
    sheet = Image.new("RGB", (COLUMNS * CELL_WIDTH, rows * CELL_HEIGHT), "white")
    for index, (name, record, image) in enumerate(examples):
        cell = _cell(name, record, image)
        sheet.paste(cell, (index % COLUMNS * CELL_WIDTH, index // COLUMNS * CELL_HEIGHT))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)


def _first(path: Path, count: int) -> list[tuple[dict[str, Any], Path]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    images = path.parent / "images"
    found = [(record, page_path(images, path.stem, record["key"])) for record in records]
    return [pair for pair in found if pair[1].is_file()][:count]


def _cell(name: str, record: dict[str, Any], image: Path) -> Image.Image:
    cell = Image.new("RGB", (CELL_WIDTH, CELL_HEIGHT), "white")
    page = Image.open(image).convert("RGB")
    page.thumbnail((CELL_WIDTH - 2 * MARGIN, CELL_HEIGHT - 80))
    cell.paste(page, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(cell)
    draw.rectangle((MARGIN - 1, MARGIN - 1, MARGIN + page.width, MARGIN + page.height), outline="#999999")
    question = record.get("question", "P_vocab reads:")
    right = record.get("exact_match", float(record.get("cer", 1) == 0))
    top = MARGIN + page.height + 6
    font = ImageFont.load_default(size=14)
    draw.text((MARGIN, top), f"{question}"[:48], fill="black", font=font)
    draw.text((MARGIN, top + 18), f"{record['prediction']}"[:48], fill="#0a7a2f" if right else "#b00020", font=font)
    draw.text((MARGIN, top + 36), f"expected: {record['references'][0]}   [{name}]"[:52], fill="#666666", font=font)
    return cell
