"""`prepare sroie`: real receipts of the SROIE competition (ICDAR 2019) as datasets of pages and of their lines.

Expects folders of images `NNN.jpg` with `NNN.json`: `{"fields": {name: value}, "lines": [{"quad": [x0, y0, ...],
"text"}]}`, quads clockwise from the upper left in pixels. The first receipts in the order of their names are held out.
Writes

- `train/`: the pages of the others, with all fields as one conversation;
- `heldout/`: every field of a page held out as a question, `meta.group` is the field;
- `lines/`: crops of their lines, each on white paper at the size that the embedded default reads best;
- `sheets/`: the lines of the others in the same size, as many on a sheet as fit.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.preprocessing.images.trim import scale_to_width, trim_page
from alignvlm_pl.preprocessing.imaging import load_image
from alignvlm_pl.utils.text_files import decode_text

from ..shards.manifest import MANIFEST_NAME
from ..shards.sample_formats import conversation
from ..shards.writer import ShardWriter
from ..storage.file_kinds import compressed_name, file_in_any_case, is_companion, path_text
from .pack.options import require_at_least
from .sources.images import is_image_file
from .sources.json_files import is_text, parse_object
from .sources.source import checked_image

FIELDS = ("company", "date", "address", "total")
"""Order of the questions about a page; other fields follow."""
HELD_OUT = 60
PAGE_WIDTH_PX = 768
LICENSE = "ICDAR 2019 SROIE competition"
TEXT_HEIGHT_PX = 22
"""Height of a line's box after scaling: with capitals, 16 to 20 px of ink."""
TILE_WIDTH_PX, TILE_HEIGHT_PX, ROW_HEIGHT_PX, MARGIN_PX, PADDING_PX = 256, 96, 32, 6, 3
"""CONTRACT: the tile of configs/model/embedded.yaml, or a crop would be split over two rows of tiles."""
SHEET_PX, GAP_PX = 768, 16
"""CONTRACT: a sheet is a tile of configs/model/receipts.yaml, of rows as high as its visual tokens."""
_LEAST_PX, _FARTHEST_PX = -1000, 20_000
MAX_WIDTH_PX = 3 * TILE_WIDTH_PX
_Sample = tuple[dict[str, Any], bytes, str]
"""Record in the sample schema, its image and the ending of the image's name."""


def main(argv: Sequence[str]) -> None:
    """Run `prepare sroie`, and print how much of what was written."""
    parser = argparse.ArgumentParser(prog="prepare sroie", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("roots", type=Path, nargs="+", metavar="root", help="folders with images NNN.jpg and NNN.json")
    parser.add_argument("out", type=Path, help="folder for the datasets")
    parser.add_argument("--train-pages", help=argparse.SUPPRESS)
    for name, default, text in (
        ("--heldout", HELD_OUT, "receipts held out, the first ones by name; all if there are no more"),
        ("--width", PAGE_WIDTH_PX, "width of the pages in px, cut to their content; 0: the images as they are"),
        ("--max-lines", 400, "line crops of receipts held out"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    options = vars(parser.parse_args(list(argv)))
    if options.pop("train_pages") is not None:
        raise ConfigError("--train-pages was removed: give the number of the other receipts with --heldout")
    sys.stdout.write(json.dumps(prepare_sroie(options.pop("roots"), options.pop("out"), **options)) + "\n")


def prepare_sroie(
    roots: Sequence[Path],
    out: Path,
    *,
    heldout: int = HELD_OUT,
    width: int = PAGE_WIDTH_PX,
    max_lines: int = 400,
) -> dict[str, int]:
    """Write the datasets `train`, `heldout`, `lines` and `sheets` to `out`, but for those without a sample.

    Args:
        roots: Folders of receipts, each with names of its own.
        out: Output folder.
        heldout: Receipts held out, in name order; all if there are no more.
        width: Width of the pages in pixels, which are cut to their content; 0: the files as they are.
        max_lines: Line crops, spread evenly over the receipts held out.

    Returns:
        Samples by dataset, and `empty_fields`, which are left out.

    Raises:
        ConfigError: A number is too small.
        DataError: A folder holds no receipts, two hold one of the same name, an annotation has another form, or `out`
            has a dataset that would now be without a sample; names file and line.
    """
    require_at_least(0, heldout=heldout, width=width)
    require_at_least(1, max_lines=max_lines)
    receipts = _receipts(roots)
    held, others = receipts[:heldout], receipts[heldout:]
    counts = {
        "train": _write(out / "train", "sroie-train", _train_pages(others, width)),
        "heldout": _write(out / "heldout", "sroie-heldout", _questions(held, width)),
        "lines": _write(out / "lines", "sroie-lines", _lines(held, max_lines)),
        "sheets": _write(out / "sheets", "sroie-sheets", _sheets(others)),
    }
    return counts | {"empty_fields": sum(one.empty for one in receipts)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Receipt:
    """A receipt: its image, its fields that are not empty in the order of `FIELDS`, its lines, its empty fields."""

    image: Path
    fields: list[tuple[str, str]]
    lines: list[dict[str, Any]]
    empty: int

    @property
    def id(self) -> str:
        return f"sroie/{path_text(self.image.stem)}"


_Line = tuple[_Receipt, dict[str, Any]]
"""A receipt, and one of its annotated lines."""


def _receipts(roots: Sequence[Path]) -> list[_Receipt]:
    """Read the receipts of all folders, in the order of their names."""
    found: dict[str, Path] = {}
    notes: dict[str, dict[str, Any]] = {}
    for root in roots:
        paths = [path for path in sorted(root.glob("*")) if not is_companion(path.name) and is_image_file(path)]
        pages = {path.stem: path for path in paths}
        files = {stem: file for stem in pages if (file := file_in_any_case(root, f"{stem}.json"))}
        if not files:
            packed = compressed_name(sorted(os.listdir(root)), ".json") if root.is_dir() else ""
            expected = packed or "expected an image NNN.jpg, .png or other with NNN.json"
            raise DataError(f"{root} holds no receipts: {expected}")
        for stem, file in files.items():
            if stem in found:
                raise DataError(
                    f"{found[stem]} and {pages[stem]}: two receipts of the name {stem!r}; rename one, or leave one out"
                )
            found[stem], notes[stem] = pages[stem], _annotation(file)
    return [_receipt(found[stem], notes[stem]) for stem in sorted(found)]


def _receipt(image: Path, note: Mapping[str, Any]) -> _Receipt:
    given = note["fields"]
    names = sorted(given, key=lambda name: FIELDS.index(name) if name in FIELDS else len(FIELDS))
    fields = [(name, given[name].strip()) for name in names if is_text(given[name])]
    return _Receipt(image=image, fields=fields, lines=note["lines"], empty=len(given) - len(fields))


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


def _write(folder: Path, name: str, samples: Iterator[_Sample]) -> int:
    """Write the samples as a dataset, none if there is none; return their number."""
    first = next(samples, None)
    if first is None:
        if (folder / MANIFEST_NAME).exists():
            raise DataError(
                f"{folder} has an earlier dataset, and no receipt is left for it; delete it, or set --heldout"
            )
        return 0
    with ShardWriter(folder, name=name, source="sroie", license=LICENSE, overwrite=True) as writer:
        for record, image, ending in chain([first], samples):
            writer.add(record, [image], [ending])
    return writer.num_samples


def _train_pages(receipts: Sequence[_Receipt], width: int) -> Iterator[_Sample]:
    for receipt in receipts:
        image, ending, lines = _page(receipt, width)
        messages = conversation([(f"What is the {name}?", value) for name, value in receipt.fields], num_images=1)
        yield {"id": receipt.id, "task": "vqa", "messages": messages, "lines": lines}, image, ending


def _questions(receipts: Sequence[_Receipt], width: int) -> Iterator[_Sample]:
    for receipt in receipts:
        image, ending, lines = _page(receipt, width)
        for name, value in receipt.fields:
            record = {
                "id": f"{receipt.id}/{name}",
                "task": "vqa",
                "messages": conversation([(f"What is the {name}?", value)], num_images=1),
                "references": [value],
                "lines": lines,
                "meta": {"group": name},
            }
            yield record, image, ending


def _page(receipt: _Receipt, width: int) -> tuple[bytes, str, list[dict[str, Any]]]:
    """Return the page of a receipt as a file, its ending, and its lines with boxes in pixels of the page."""
    name = str(receipt.image)
    lines = [(" ".join(line["text"].split()), _box(line["quad"])) for line in receipt.lines if line["text"].strip()]
    if not width:
        data, ending = checked_image(receipt.image.read_bytes(), name)
        return data, ending, [{"text": text, "box": list(box)} for text, box in lines]
    content, (left, top, _, _) = trim_page(load_image(receipt.image, name=name))
    page = scale_to_width(content, width)
    along, down = page.width / content.width, page.height / content.height
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=95)
    mapped = []
    for text, (x0, y0, x1, y1) in lines:
        box = ((x0 - left) * along, (y0 - top) * down, (x1 - left) * along, (y1 - top) * down)
        mapped.append({"text": text, "box": [round(edge, 1) for edge in box]})
    return buffer.getvalue(), "jpg", mapped


def _box(quad: Sequence[float]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a quad."""
    return min(quad[0::2]), min(quad[1::2]), max(quad[0::2]), max(quad[1::2])


def _lines(receipts: Sequence[_Receipt], max_lines: int) -> Iterator[_Sample]:
    lines = list(_with_text(receipts))
    chosen = lines[:: max(len(lines) // max_lines, 1)][:max_lines]
    for receipt, text, line in _scaled_lines(chosen):
        crop = on_tiles(line)
        box = [MARGIN_PX, ROW_HEIGHT_PX, crop.width - MARGIN_PX, 2 * ROW_HEIGHT_PX]
        record = {
            "id": receipt.id,
            "source": "sroie",
            "task": "line",
            "messages": conversation([("Read the line.", text)], num_images=1),
            "references": [text],
            "lines": [{"text": text, "box": box}],
        }
        yield record, _png(crop), "png"


def _sheets(receipts: Sequence[_Receipt]) -> Iterator[_Sample]:
    sheet = _Sheet()
    for receipt, text, line in _scaled_lines(_with_text(receipts)):
        if not sheet.add(receipt.id, text, line):
            yield sheet.sample()
            sheet = _Sheet()
            sheet.add(receipt.id, text, line)
    if sheet.lines:
        yield sheet.sample()


class _Sheet:
    """Lines side by side and below each other, each in one row of visual tokens."""

    def __init__(self) -> None:
        self.image = Image.new("L", (SHEET_PX, SHEET_PX), "white")
        self.lines: list[dict[str, Any]] = []
        self.receipts: dict[str, None] = {}
        self._x, self._y = MARGIN_PX, 0

    def add(self, receipt: str, text: str, line: Image.Image) -> bool:
        """Paste a line of a receipt, at most `MAX_WIDTH_PX` less its margins wide; return whether there was room."""
        if self._x + line.width > SHEET_PX - MARGIN_PX:
            self._x, self._y = MARGIN_PX, self._y + ROW_HEIGHT_PX
        if self._y + ROW_HEIGHT_PX > SHEET_PX:
            return False
        self.image.paste(line, (self._x, self._y + (ROW_HEIGHT_PX - line.height) // 2))
        box = [self._x, self._y, self._x + line.width, self._y + ROW_HEIGHT_PX]
        self.lines.append({"text": text, "box": box})
        self.receipts.setdefault(receipt)
        self._x += line.width + GAP_PX
        return True

    def sample(self) -> _Sample:
        text = "\n".join(line["text"] for line in self.lines)
        record = {
            "id": "+".join(self.receipts),
            "source": "sroie",
            "task": "line",
            "messages": conversation([("Read the lines.", text)], num_images=1),
            "lines": self.lines,
        }
        return record, _png(self.image), "png"


def _with_text(receipts: Sequence[_Receipt]) -> Iterator[_Line]:
    return ((receipt, line) for receipt in receipts for line in receipt.lines if line["text"].strip())


def _scaled_lines(lines: Iterable[_Line]) -> Iterator[tuple[_Receipt, str, Image.Image]]:
    """Yield receipt, text and image of lines, opening each page once."""
    for image, of_page in groupby(lines, key=lambda box: box[0].image):
        page = load_image(image, name=image.name)
        for receipt, line in of_page:
            yield receipt, " ".join(line["text"].split()), scaled_line(page, line["quad"])


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scaled_line(page: Image.Image, quad: Sequence[float]) -> Image.Image:
    """Cut one line out of a page, scaled to `TEXT_HEIGHT_PX`, black on white."""
    left, top, right, bottom = _box(quad)
    scale = TEXT_HEIGHT_PX / max(bottom - top, 1)
    scale = min(scale, (MAX_WIDTH_PX - 2 * (MARGIN_PX + PADDING_PX) - 1) / max(right - left, 1))
    pad = PADDING_PX / scale
    box = (round(left - pad), round(top - pad), round(right + pad), round(bottom + pad))
    # Paper to white and ink to black, so that the crop's edges do not show on the canvas.
    crop = ImageOps.autocontrast(page.convert("L").crop(box), cutoff=(1, 20))
    size = (max(round(crop.width * scale), 1), max(round(crop.height * scale), 1))
    return crop.resize(size, Image.Resampling.BICUBIC)


def on_tiles(line: Image.Image) -> Image.Image:
    """Centre a line on the second row of a blank canvas of whole tiles."""
    tiles = -(-(line.width + 2 * MARGIN_PX) // TILE_WIDTH_PX)
    canvas = Image.new("L", (tiles * TILE_WIDTH_PX, TILE_HEIGHT_PX), "white")
    canvas.paste(line, (MARGIN_PX, ROW_HEIGHT_PX + (ROW_HEIGHT_PX - line.height) // 2))
    return canvas
