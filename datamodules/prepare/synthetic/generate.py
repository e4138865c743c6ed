"""One synthetic document: an image, its text lines with boxes, and a conversation about it, from a seed."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from alignvlm_pl.errors import ConfigError, nearest

from ...shards.sample_formats import conversation
from . import covered, layouts, pages
from .lexicon import check_split
from .receipt_page import receipt_page
from .sheet import Question, Segment, Sheet
from .style import COLUMN_WIDTH_PX, ROW_HEIGHT_PX, Style, draw_page_style, draw_style
from .words import QUESTIONS

Box = tuple[float, float, float, float]
_PAD = 6
_WIDE_GAP_PX = 3.0
_CUT_AT = 2.6
"""The largest angle of a skewed page, in standard deviations."""
_MOST_SKEW_PX = 3.0
"""How far the ends of a line of a skewed whole page may leave its row."""


def render_sheet(sheet: Sheet) -> tuple[Image.Image, bytes, str, list[Box]]:
    """Draw a sheet; the same sheet and random state give the same bytes.

    Returns:
        A grey-level page, the same as a file, its ending ``png`` or ``jpg``, and the box of each segment in px.
    """
    rng, style = sheet.rng, sheet.style
    page = Image.new("L", (sheet.width, sheet.num_rows * ROW_HEIGHT_PX), style.paper)
    _draw_shapes(page, sheet)
    jitters = [rng.uniform(-2.5, 2.5) for _ in range(sheet.num_rows)]
    boxes = [_draw_text(page, segment, style, jitters[segment.row]) for segment in sheet.segments]
    if sheet.picture is not None:
        page.paste(sheet.picture, (0, 0))
    for index, visible in sheet.covers.items():
        left, top, right, bottom = boxes[index]
        edge = max(1, round(visible * (bottom - top)))
        page.paste(style.paper, (int(left) - 1, int(top) + edge, int(right) + 2, int(bottom) - edge))
    if rng.random() < 0.5:
        page, boxes = _skew(page, boxes, rng.gauss(0, sheet.skew_deg), _CUT_AT * sheet.skew_deg, style.paper)
    if rng.random() < sheet.fault_share:
        page = _degrade(page, style, rng)
    return *_encode(page, rng), boxes


def _draw_shapes(page: Image.Image, sheet: Sheet) -> None:
    pen, style = ImageDraw.Draw(page), sheet.style
    for shape in sheet.shapes:
        colour = round(style.paper + (style.ink - style.paper) * shape.tone)
        pen.rectangle(shape.box, fill=colour if shape.filled else None, outline=None if shape.filled else colour)


def _draw_text(page: Image.Image, segment: Segment, style: Style, jitter_px: float) -> Box:
    """Draw one segment `jitter_px` off the middle of its row and return the box of its ink."""
    style = style.scaled(segment.scale)
    mask, pad = _text_mask(segment, style)
    jitter = 0.0 if segment.knockout else jitter_px
    # Capitals reach 0.7 of the size above the baseline; without tails they may be centred exactly.
    drop = 0.36 if style.case == "upper" else 0.30
    baseline = (segment.row + 0.5) * ROW_HEIGHT_PX + drop * style.size_px + jitter
    left, top = round(segment.left - pad), round(baseline - style.size_px) - _PAD
    page.paste(style.paper if segment.knockout else style.ink, (left, top), mask)
    x0, y0, x1, y1 = mask.getbbox() or (0, 0, 1, 1)
    return (left + x0, top + y0, left + x1, top + y1)


def _text_mask(segment: Segment, style: Style) -> tuple[Image.Image, float]:
    """Draw a text at the width of its segment; returns the mask and the empty px at its left."""
    font, text = style.font(bold=segment.bold), segment.text
    natural = font.getlength(text)
    gap = max(0.0, segment.width / style.squeeze - natural) / max(1, len(text) - 1)
    if gap > _WIDE_GAP_PX:  # more would look like loose letters: widen the glyphs for the rest
        gap = _WIDE_GAP_PX + (gap - _WIDE_GAP_PX) * 0.5
    total = natural + gap * (len(text) - 1)
    mask = Image.new("L", (math.ceil(total) + 2 * _PAD, 2 * style.size_px + 2 * _PAD), 0)
    pen, baseline = ImageDraw.Draw(mask), style.size_px + _PAD
    if gap < 0.05:
        pen.text((_PAD, baseline), text, fill=255, font=font, anchor="ls")
    else:
        x = float(_PAD)
        for character in text:
            pen.text((x, baseline), character, fill=255, font=font, anchor="ls")
            x += font.getlength(character) + gap
    scale = segment.width / total
    return mask.resize((round(mask.width * scale), mask.height), Image.Resampling.BICUBIC), _PAD * scale


def _skew(
    page: Image.Image, boxes: list[Box], degrees: float, most: float, paper: int
) -> tuple[Image.Image, list[Box]]:
    """Turn the page about its centre by a small angle, and the boxes with it."""
    degrees = max(-most, min(most, degrees))
    turned = page.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=paper)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cx, cy = page.width / 2, page.height / 2

    def turn(box: Box) -> Box:
        x0, y0, x1, y1 = box
        corners = [(x - cx, y - cy) for x in (x0, x1) for y in (y0, y1)]
        xs = [cx + x * cos + y * sin for x, y in corners]
        ys = [cy - x * sin + y * cos for x, y in corners]
        return max(0.0, min(xs)), max(0.0, min(ys)), min(float(page.width), max(xs)), min(float(page.height), max(ys))

    return turned, [turn(box) for box in boxes]


def _degrade(page: Image.Image, style: Style, rng: Random) -> Image.Image:
    """Apply a few faults, each with its own probability."""
    if rng.random() < 0.25:
        scale = rng.uniform(0.6, 0.9)
        small = page.resize((round(page.width * scale), round(page.height * scale)), Image.Resampling.BILINEAR)
        page = small.resize(page.size, rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)))
    if rng.random() < 0.35:
        page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    pixels = np.asarray(page, dtype=np.float32)
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    if rng.random() < 0.25:
        pixels = _break_strokes(pixels, style, rng, noise)
    if rng.random() < 0.2:
        ramp = np.linspace(0, rng.uniform(-40, 0), page.width, dtype=np.float32)
        pixels = pixels + (ramp if rng.random() < 0.5 else ramp[::-1])[None, :]
    if rng.random() < 0.35:
        pixels = pixels + noise.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(2, 14)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _break_strokes(pixels: np.ndarray, style: Style, rng: Random, noise: np.random.Generator) -> np.ndarray:
    """Let paper show through the ink, in specks and in the thin streaks of worn thermal print heads."""
    holes = noise.random(pixels.shape, dtype=np.float32) < rng.uniform(0.02, 0.09)
    strength = np.float32(rng.uniform(0.4, 0.9))
    for _ in range(rng.randint(0, 5)):
        if rng.random() < 0.6:
            holes[:, rng.randrange(pixels.shape[1])] = True
        else:
            holes[rng.randrange(pixels.shape[0]), :] = True
    return np.where(holes, pixels + (style.paper - pixels) * strength, pixels)


def _encode(page: Image.Image, rng: Random) -> tuple[Image.Image, bytes, str]:
    """Store as PNG, or as JPEG with its artefacts; the image returned is the one a reader gets."""
    stream = io.BytesIO()
    if rng.random() < 0.3:
        page.save(stream, "JPEG", quality=rng.randint(35, 90))
        page = Image.open(io.BytesIO(stream.getvalue()))
        page.load()
        return page, stream.getvalue(), "jpg"
    page.save(stream, "PNG", compress_level=1)
    return page, stream.getvalue(), "png"


_LAYOUTS = (layouts.lines, layouts.string, layouts.form, layouts.receipt, layouts.table, layouts.chart)
LAYOUTS: dict[str, Callable[[Sheet], None]] = {
    **{layout.__name__: layout for layout in _LAYOUTS},
    "vcr-easy": covered.vcr_easy,
    "vcr-hard": covered.vcr_hard,
}
KINDS = tuple(LAYOUTS)
"""Kinds of small documents."""
_READ_ONLY = ("lines", "string")
"""Kinds without questions: all of their text is to be transcribed."""
_DEFAULT = ("form", "receipt", "table", "chart")
PAGE_LAYOUTS: dict[str, Callable[[Sheet], None]] = {
    "receipt-page": receipt_page,
    "form-page": pages.form_page,
    "table-page": pages.table_page,
}
PAGE_KINDS = tuple(PAGE_LAYOUTS)
"""Kinds of whole pages, which are as high as their content."""
SOURCE = "synthetic"
MIN_WIDTH_PX = 192
MIN_HEIGHT_PX = 96
MIN_PAGE_WIDTH_PX = 640


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document of one of the `KINDS` or `PAGE_KINDS`: a grey-level page, the same as a ``png`` or ``jpg`` file, the
    turns of the conversation, and the text of each row, top to bottom, as ``{"text", "box": [x0, y0, x1, y1]}`` in px.
    """

    kind: str
    image: Image.Image
    encoded: bytes
    extension: str
    turns: list[Question]
    lines: list[dict[str, Any]]

    def record(self, turn: Question | None = None) -> dict[str, Any]:
        """Return the JSON of a sample (datamodules/shards/sample.py) of all turns, or of one with its reference."""
        turns = [turn] if turn else self.turns
        record = {
            "source": SOURCE,
            "task": f"{SOURCE}-{self.kind}",
            "messages": conversation([(turn.text, turn.answer) for turn in turns], num_images=1),
            "lines": self.lines,
        }
        return record | ({"references": [turn.answer]} if turn else {})


def generate_document(
    seed: int,
    *,
    split: str,
    kind: str | None = None,
    fonts: str = "train",
    width: int = 256,
    height: int = 128,
    num_questions: int = 4,
    transcription_share: float = 0.1,
    fault_share: float = 0.67,
) -> Document:
    """Render one document. A pure function: the same arguments give the same bytes.

    Args:
        seed: Any whole number.
        split: ``train`` or ``heldout``: which words and values the page may show.
        kind: Layout; a random one of forms, receipts, tables and charts where None.
        fonts: ``train`` typefaces or the ``heldout`` ones.
        width: Width in px, a multiple of 8.
        height: Height in px, a multiple of 32: one line of text each. Whole pages have the height that they need.
        num_questions: Most turns of the conversation, at least 1; whole receipts first of all ask for the usual four.
        transcription_share: Share (0-1) of documents whose last turn asks for all text; ``lines`` and ``string``
            always do.
        fault_share: Probability (0-1) of faults of paper, printer and scanner (blur, noise, worn strokes).

    Raises:
        ConfigError: An unknown split, kind or font set, a size that does not fit the grid, or a missing package.
    """
    check_split(split)
    if kind is not None and kind not in (*KINDS, *PAGE_KINDS):
        raise ConfigError(f"kind of a synthetic document: unknown {kind!r}; {nearest(kind, (*KINDS, *PAGE_KINDS))}")
    whole = kind in PAGE_KINDS
    if whole:
        height = 0
        if width < MIN_PAGE_WIDTH_PX or width % COLUMN_WIDTH_PX:
            raise ConfigError(
                f"width of a whole synthetic page: expected at least {MIN_PAGE_WIDTH_PX} in steps of {COLUMN_WIDTH_PX} "
                f"px, found {width}"
            )
    lowest = ROW_HEIGHT_PX if kind == "string" else MIN_HEIGHT_PX
    if not whole and (width < MIN_WIDTH_PX or width % COLUMN_WIDTH_PX or height < lowest or height % ROW_HEIGHT_PX):
        raise ConfigError(
            f"size of a synthetic document: expected a width of at least {MIN_WIDTH_PX} in steps of {COLUMN_WIDTH_PX} "
            f"and a height of at least {lowest} in steps of {ROW_HEIGHT_PX} px, found {width}x{height}"
        )
    if num_questions < 1:
        raise ConfigError(f"questions per synthetic document: expected 1 or more, found {num_questions}")
    rng = Random(f"{seed}/{split}/{kind}/{fonts}/{width}x{height}")
    kind = kind or rng.choice(_DEFAULT)
    sheet = Sheet(
        rng=rng,
        split=split,
        style=draw_page_style(rng, fonts=fonts) if whole else draw_style(rng, fonts=fonts),
        width=width,
        num_rows=height // ROW_HEIGHT_PX,
        fault_share=fault_share,
    )
    if whole:
        sheet.skew_deg = math.degrees(_MOST_SKEW_PX / (width / 2)) / _CUT_AT
    (PAGE_LAYOUTS if whole else LAYOUTS)[kind](sheet)
    image, encoded, extension, boxes = render_sheet(sheet)
    lines = _lines(sheet, boxes)
    turns = _turns(sheet, lines, num_questions, 1.0 if kind in _READ_ONLY else transcription_share)
    return Document(kind=kind, image=image, encoded=encoded, extension=extension, turns=turns, lines=lines)


def _lines(sheet: Sheet, boxes: list[Box]) -> list[dict[str, Any]]:
    """Join the texts of each row, left to right, with the hull of their boxes.

    CONTRACT: one entry per row of visual tokens, which is what the read warm start spells out per row.
    """
    rows: dict[int, list[tuple[Box, str]]] = {}
    for segment, box in zip(sheet.segments, boxes, strict=True):
        rows.setdefault(segment.row, []).append((box, segment.text))
    lines = []
    for _, parts in sorted(rows.items()):
        parts.sort(key=lambda part: part[0][0])
        hull = [pick(box[side] for box, _ in parts) for side, pick in enumerate((min, min, max, max))]
        lines.append({"text": " ".join(text for _, text in parts), "box": [round(edge, 1) for edge in hull]})
    return lines


def _turns(sheet: Sheet, lines: list[dict[str, Any]], num_questions: int, transcription_share: float) -> list[Question]:
    """Choose the turns of the conversation from what can be asked about the page."""
    rng, chosen = sheet.rng, list(sheet.questions)
    rng.shuffle(chosen)
    if sheet.usual:
        chosen = [*rng.sample(sheet.usual, len(sheet.usual)), *chosen][:num_questions]
        rng.shuffle(chosen)
    chosen = chosen[:num_questions]
    if rng.random() < transcription_share or not chosen:
        text = "\n".join(line["text"] for line in lines)
        # Last, or the other answers could be copied from it instead of being read off the page.
        chosen = [*chosen[: num_questions - 1], Question(text=rng.choice(QUESTIONS["transcribe"]), answer=text)]
    return chosen
