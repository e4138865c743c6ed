"""Pages painted with what P_vocab reads: a cell for each visual token, at its place."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 32  # shortest side of a cell that text is legible in
MAX_PX = 2000  # longest side of a painted page
_INK = 0.5  # of the page that is left below the cells
_ALPHA, _BLANK_ALPHA = 165, 60  # opacity of a cell, 0 to 255
_COLOURS = ((120, 205, 235), (130, 220, 150), (255, 215, 80), (245, 130, 60), (190, 40, 110))
"""Colours of the entropy, evenly spaced on the scale from certain to uniform."""
_MARGIN, _LEAST_WIDTH, _BAR_PX = 12, 480, 260  # of the legend
_HATCH, _TEXT, _GREY = "#c8c8c8", "black", "#555555"


def paint_readout(
    page: Image.Image,
    tokens: Sequence[Any],
    *,
    most: float,
    size: tuple[int, int] | None = None,
    label: str = "entropy of P_vocab in nats",
) -> Image.Image:
    """Return a page, faded, with the visual tokens that were read on it, their colours' scale below it.

    `tokens` are those of `models.token_readout.read_page`. A cell has the colour of its token's entropy, on a scale of
    0 to `most` nats, and its text unless it is blank; a token that the LLM does not get is a hatched white cell. The
    thumbnail's tokens are painted on a page of their own, below. `size` (width, height) in pixels is that of the image
    that the tokens' boxes are of; None: the page's. `label` is that of the scale, where it is not the entropy.
    """
    size = size or page.size
    panels = [[token for token in tokens if token.in_thumbnail is within] for within in (False, True)]
    sides = (MAX_PX, MAX_PX // 2)  # a thumbnail has few tokens
    images = [_paint(page, panel, most, size, side) for panel, side in zip(panels, sides, strict=True) if panel]
    legend = _legend(tokens, most, label, width=max([_LEAST_WIDTH, *(image.width for image in images)]))
    images.append(legend)
    sheet = Image.new("RGB", (legend.width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet


def entropy_colour(entropy: float, most: float) -> tuple[int, int, int]:
    """Return the colour of an entropy in nats, on a scale from 0 to `most` on which the root is linear."""
    place = _place(entropy, most) * (len(_COLOURS) - 1)
    index = min(int(place), len(_COLOURS) - 2)
    share = place - index
    red, green, blue = (
        round((1 - share) * low + share * high) for low, high in zip(_COLOURS[index], _COLOURS[index + 1], strict=True)
    )
    return red, green, blue


def visible(text: str) -> str:
    """Return a token's text with spaces as dots, and line breaks and control characters as Python writes them."""
    shown = text.replace(" ", "·")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)


def _place(entropy: float, most: float) -> float:
    """Return where an entropy is on the scale, 0 to 1; by its root, as the certain ones differ most."""
    # Of weights that are not finite there is none; the run ends with an error of its own.
    return 1.0 if math.isnan(entropy) else math.sqrt(min(max(entropy / most, 0.0), 1.0))


def _paint(page: Image.Image, tokens: Sequence[Any], most: float, size: tuple[int, int], longest: int) -> Image.Image:
    shown = [token for token in tokens if token.box[2] > token.box[0] and token.box[3] > token.box[1]]
    # The median, as padding cuts some.
    shortest = median(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (token.box for token in shown)) if shown else CELL_PX
    factor = min(CELL_PX / shortest, longest / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    faded = page.convert("L").convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    faded = Image.blend(Image.new("RGB", faded.size, "white"), faded, _INK)
    draw = ImageDraw.Draw(faded, "RGBA")
    for token in shown:
        _paint_cell(draw, token, [round(edge * factor) for edge in token.box], most)
    return faded


def _paint_cell(draw: ImageDraw.ImageDraw, token: Any, box: list[int], most: float) -> None:
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if right <= left or bottom <= top:
        return
    if not token.kept:
        _hatch(draw, (left, top, right, bottom))
        return
    colour = entropy_colour(token.entropy, most)
    alpha = _BLANK_ALPHA if token.blank else _ALPHA
    draw.rectangle((left, top, right, bottom), fill=(*colour, alpha), outline=(255, 255, 255, 200))
    if token.blank:
        return
    text, font = _fitted(visible(token.text), right - left - 4, bottom - top)
    middle = ((left + right) / 2, (top + bottom) / 2)
    halo = 2 if font.size > 12 else 1
    draw.text(middle, text, fill=_TEXT, font=font, anchor="mm", stroke_width=halo, stroke_fill="white")


def _hatch(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], step: int = 8) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, fill=(255, 255, 255, 235))
    # Lines x + y = c, through all cells alike.
    for total in range((left + top) // step * step + step, right + bottom, step):
        start, end = max(left, total - bottom), min(right, total - top)
        draw.line((start, total - start, end, total - end), fill=_HATCH)


@lru_cache(maxsize=4096)
def _fitted(text: str, width: int, height: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text and a font with which it fits into a cell, the end left out where it is long."""
    for size in range(min(round(height * 0.8), 30), 8, -1):
        if _font(size).getlength(text) <= width:
            return text, _font(size)
    font = _font(9)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1] if len(text) < 3 else f"{text[:-2]}…"
    return text, font


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _legend(tokens: Sequence[Any], most: float, label: str, *, width: int) -> Image.Image:
    """Return how many visual tokens the LLM gets, the scale, and a sample of each kind of cell."""
    image = Image.new("RGB", (width, 94), "white")
    draw, font = ImageDraw.Draw(image, "RGBA"), _font(13)
    count = f"the LLM gets {sum(token.kept for token in tokens):,} of {len(tokens):,} visual tokens"
    draw.text((_MARGIN, 14), count, fill=_TEXT, font=font, anchor="lm")
    _draw_scale(draw, most, top=28)
    draw.text((_MARGIN + _BAR_PX + 14, 34), label, fill=_GREY, font=font, anchor="lm")
    x, middle = _MARGIN, 78
    kinds = {"most probable token": (_ALPHA, "a"), "blank": (_BLANK_ALPHA, ""), "blank, not in the sequence": (0, "")}
    if all(token.kept for token in tokens):
        kinds.popitem()
    for label, (alpha, text) in kinds.items():
        box = (x, middle - 9, x + 14, middle + 9)
        if alpha:
            draw.rectangle(box, fill=(*_COLOURS[0], alpha))
        else:
            _hatch(draw, box)
        draw.rectangle(box, outline=_HATCH)
        draw.text((x + 7, middle), text, fill=_TEXT, font=font, anchor="mm")
        draw.text((x + 20, middle), label, fill=_GREY, font=font, anchor="lm")
        x += 36 + round(font.getlength(label))
    return image


def _draw_scale(draw: ImageDraw.ImageDraw, most: float, *, top: int) -> None:
    for x in range(_BAR_PX):
        colour = entropy_colour(most * (x / _BAR_PX) ** 2, most)
        draw.line((_MARGIN + x, top, _MARGIN + x, top + 12), fill=(*colour, _ALPHA))
    for tick in (0.0, *(value for value in (0.1, 0.5, 1.0, 2.0, 4.0) if value < 0.7 * most), most):
        x = _MARGIN + round(_place(tick, most) * _BAR_PX)
        draw.line((x, top + 12, x, top + 16), fill=_GREY)
        draw.text((x, top + 17), f"{tick:.3g}", fill=_GREY, font=_font(11), anchor="ma")
