"""`prepare sroie`: real receipts of the SROIE competition (ICDAR 2019) as question pages and as crops of their lines.

Expects a folder of images `NNN.jpg` with `NNN.json`: `{"fields": {name: value}, "lines": [{"quad": [x0, y0, ...],
"text"}]}`, quads clockwise from the upper left in pixels. Writes

- `pages-train.jsonl`, `pages-test.jsonl`: every field as a question, ready for `prepare jsonl`;
- `lines/`: shards of line crops, set on white paper at the size that the embedded default reads best.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from alignvlm_pl.errors import DataError
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.utils.text_files import decode_text

from ..shards.sample_formats import conversation
from ..shards.writer import ShardWriter
from ..storage.file_kinds import compressed_name, file_in_any_case, is_companion, path_text
from .pack.options import require_at_least
from .sources.images import is_image_file
from .sources.json_files import is_text, parse_object

LICENSE = "ICDAR 2019 SROIE competition"
TEXT_HEIGHT_PX = 22
"""Height of a line's box after scaling: with capitals, 16 to 20 px of ink."""
TILE_WIDTH_PX, TILE_HEIGHT_PX, ROW_HEIGHT_PX, MARGIN_PX, PADDING_PX = 256, 96, 32, 6, 3
"""CONTRACT: the tile of configs/model/embedded.yaml, or a crop would be split over two rows of tiles."""
_LEAST_PX, _FARTHEST_PX = -1000, 20_000
MAX_WIDTH_PX = 3 * TILE_WIDTH_PX


def main(argv: Sequence[str]) -> None:
    """Run `prepare sroie`, and print how much of what was written."""
    parser = argparse.ArgumentParser(prog="prepare sroie", description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder with images NNN.jpg and NNN.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-pages", type=int, default=45, help="receipts for training (default: %(default)s)")
    parser.add_argument("--max-lines", type=int, default=400, help="line crops (default: %(default)s)")
    options = parser.parse_args(list(argv))
    counts = prepare_sroie(options.root, options.out, train_pages=options.train_pages, max_lines=options.max_lines)
    sys.stdout.write(json.dumps(counts) + "\n")


def prepare_sroie(root: Path, out: Path, *, train_pages: int = 45, max_lines: int = 400) -> dict[str, int]:
    """Write questions about pages and shards of line crops to `out`; return how many.

    Args:
        root: Folder of receipts.
        out: Output folder.
        train_pages: Receipts, in name order, whose questions are for training; the others are for testing.
        max_lines: Line crops, spread evenly over all receipts.

    Raises:
        ConfigError: A number is too small.
        DataError: The folder holds no receipts, or an annotation has another form; names file and line.
    """
    require_at_least(0, train_pages=train_pages)
    require_at_least(1, max_lines=max_lines)
    pages = {path.stem: path for path in sorted(root.glob("*")) if not is_companion(path.name) and is_image_file(path)}
    files = {page: file_in_any_case(root, f"{name}.json") for name, page in sorted(pages.items())}
    notes = {page.name: _annotation(file) for page, file in files.items() if file}
    if not notes:
        packed = compressed_name(sorted(os.listdir(root)), ".json") if root.is_dir() else ""
        expected = packed or "expected an image NNN.jpg, .png or other with NNN.json"
        raise DataError(f"{root} holds no receipts: {expected}")
    names = list(notes)
    train = [_page(name, list(notes[name]["fields"].items())) for name in names[:train_pages]]
    test = [_page(name, [field]) for name in names[train_pages:] for field in notes[name]["fields"].items()]
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"pages-{part}.jsonl").write_text(text, encoding="utf-8")
    lines = _write_lines(root, out, notes, max_lines)
    return {"train_pages": len(train), "test_questions": len(test), "lines": lines}


def _annotation(path: Path) -> dict[str, Any]:
    try:
        note = parse_object(decode_text(path.read_bytes()), where=str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(note.get("fields"), dict) or not isinstance(note.get("lines"), list):
        raise DataError(f"{path}: expected an object with `fields` and `lines`, found keys {sorted(note)}")
    fields = note["fields"]
    # A receipt of the release has an empty total.
    if not any(map(is_text, fields.values())) or not all(isinstance(value, str) for value in fields.values()):
        raise DataError(f"{path}: expected texts by name as `fields`, found {fields!r:.120}")
    for number, line in enumerate(note["lines"]):
        if not isinstance(line, Mapping) or not isinstance(line.get("text"), str) or not _is_quad(line.get("quad")):
            raise DataError(
                f"{path}, line {number}: expected `text` and `quad` (corners x0, y0, … in pixels), found {line!r:.120}"
            )
    return note


def _is_quad(quad: object) -> bool:
    return (
        isinstance(quad, list)
        and len(quad) >= 4
        and len(quad) % 2 == 0
        and all(type(side) in (int, float) and _LEAST_PX <= side <= _FARTHEST_PX for side in quad)  # False for nan
    )


def _page(name: str, fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    messages = []
    for index, (field, value) in enumerate(fields):
        image = "<|image|>" if index == 0 else ""
        messages.append({"role": "user", "content": f"{image}What is the {field}?"})
        messages.append({"role": "assistant", "content": value})
    return {"image": [name], "messages": messages, "task_name": "qa_sft", "dataset_name": "SROIE"}


def _write_lines(root: Path, out: Path, notes: dict[str, dict[str, Any]], max_lines: int) -> int:
    boxes = [(name, line) for name, note in notes.items() for line in note["lines"] if line["text"].strip()]
    chosen = boxes[:: max(len(boxes) // max_lines, 1)][:max_lines]
    folder = out / "lines"
    with ShardWriter(folder, name="sroie-lines", source="sroie", license=LICENSE, overwrite=True) as writer:
        for name, lines in groupby(chosen, key=lambda box: box[0]):
            page = load_image(root / name, name=name)
            for _, line in lines:
                crop, text = line_crop(page, line["quad"]), " ".join(line["text"].split())
                buffer = io.BytesIO()
                crop.save(buffer, "PNG")
                box = [MARGIN_PX, ROW_HEIGHT_PX, crop.width - MARGIN_PX, 2 * ROW_HEIGHT_PX]
                record = {
                    "id": f"sroie/{path_text(Path(name).stem)}",
                    "source": "sroie",
                    "task": "line",
                    "messages": conversation([("Read the line.", text)], num_images=1),
                    "references": [text],
                    "lines": [{"text": text, "box": box}],
                }
                writer.add(record, [buffer.getvalue()], ["png"])
    return writer.num_samples


def line_crop(page: Image.Image, quad: Sequence[float]) -> Image.Image:
    """Cut one line out of a page and centre it on the second row of a blank canvas of whole tiles."""
    left, right = min(quad[0::2]), max(quad[0::2])
    top, bottom = min(quad[1::2]), max(quad[1::2])
    scale = TEXT_HEIGHT_PX / max(bottom - top, 1)
    scale = min(scale, (MAX_WIDTH_PX - 2 * (MARGIN_PX + PADDING_PX) - 1) / max(right - left, 1))
    pad = PADDING_PX / scale
    box = (round(left - pad), round(top - pad), round(right + pad), round(bottom + pad))
    # Paper to white and ink to black, so that the crop's edges do not show on the canvas.
    crop = ImageOps.autocontrast(page.convert("L").crop(box), cutoff=(1, 20))
    crop = crop.resize(
        (max(round(crop.width * scale), 1), max(round(crop.height * scale), 1)), Image.Resampling.BICUBIC
    )
    tiles = -(-(crop.width + 2 * MARGIN_PX) // TILE_WIDTH_PX)
    canvas = Image.new("L", (tiles * TILE_WIDTH_PX, TILE_HEIGHT_PX), "white")
    canvas.paste(crop, (MARGIN_PX, ROW_HEIGHT_PX + (ROW_HEIGHT_PX - crop.height) // 2))
    return canvas
