"""Pages without the empty paper, dark borders and frame lines around their content, at the width a model reads best.

Pillow and numpy only; nothing is known about the kind of page.
"""

import numpy as np
from PIL import Image, ImageFilter

from ..imaging import MAX_PIXELS, MAX_SIDE

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are exclusive."""

LARGEST_SCALE = 4
"""A page with a single word on it is enlarged no further: its letters would fill the page."""

# Lengths are in pixels of the page as it is searched: its shorter side has 800 to 1,600 px if the image has as many.
_SHORTER_SIDE_PX = 800
_STROKE_PX = 9
"""Paper is this close to ink; specks are no larger, and frame lines no thicker."""
_ALONE_PX = 51
_CELL_PX = 8
_OUTER_SHARE = 0.06
"""Frame lines and the scanner's edge lie in this outer share of the page."""
_CONTRAST = (14.0, 48.0)


def trim_page(image: Image.Image, *, margin: float = 0.02) -> tuple[Image.Image, Box]:
    """Cut a page to its content and a margin around it.

    Not content are single specks, noise, soft shadows, dark areas that reach the image's border, long thin lines close
    to it, and the outermost 8 to 16 pixels. All else is, whatever the colours of paper and ink.

    Args:
        image: An upright page, RGB or grey.
        margin: Paper to leave around the content, as a share of the image's shorter side.

    Returns:
        The page, the image itself where there is nothing to cut or no content, and its box in the image in pixels.
    """
    factor = max(min(image.size) // _SHORTER_SIDE_PX, 1)
    gray = image.convert("L").reduce(factor).filter(ImageFilter.BoxBlur(1))
    ink = _ink(np.asarray(gray)) & ~_outside(gray)
    ink &= ~(_rules(ink) | _rules(ink.T).T)
    ink &= ~_specks(ink)
    around, spans = round(margin * min(image.size)), []
    for axis, side in ((0, image.width), (1, image.height)):
        found = np.flatnonzero(ink.any(axis))
        if not found.size:
            return image, (0, 0, *image.size)
        first, last = int(found[0]) * factor, int(found[-1] + 1) * factor
        spans.append((max(first - around, 0), min(last + around, side)))
    (left, right), (top, bottom) = spans
    box = (left, top, right, bottom)
    return (image if box == (0, 0, *image.size) else image.crop(box)), box


def scale_to_width(image: Image.Image, width: int) -> Image.Image:
    """Scale an image bicubically to a width in pixels, its height with it.

    It is enlarged by at most `LARGEST_SCALE`, and to no more than `load_image` accepts.
    """
    scale = min(width / image.width, LARGEST_SCALE, MAX_SIDE / max(image.size))
    scale = min(scale, (MAX_PIXELS / (image.width * image.height)) ** 0.5)
    size = (max(int(image.width * scale + 1e-6), 1), max(int(image.height * scale + 1e-6), 1))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _ink(page: np.ndarray) -> np.ndarray:
    """Return where (H, W) a grey page is darker than paper close by.

    It is so by more than the noise of the paper, most of which is blank, and more than what shines through it.
    """
    brightest = page
    for axis in (0, 1):
        half = _STROKE_PX // 2
        strips = np.moveaxis(np.pad(brightest, [(half, half) if axis == side else (0, 0) for side in (0, 1)]), axis, 0)
        shifted = [strips[first : first + page.shape[axis]] for first in range(_STROKE_PX)]
        brightest = np.moveaxis(np.maximum.reduce(shifted), 0, axis)
    depth = brightest - page
    noise, strongest = np.quantile(depth, (0.5, 0.99))
    return np.asarray(depth >= np.clip(max(4 * noise, strongest / 8), *_CONTRAST))


def _outside(gray: Image.Image) -> np.ndarray:
    """Return where (H, W) a page is dark from there to a side of the image, one cell beyond, and the outermost cell."""
    cells = np.asarray(gray.reduce(_CELL_PX))
    dark = cells < np.quantile(cells, 0.75) / 2
    outside = np.zeros_like(dark)
    for axis in (0, 1):
        outside |= np.logical_and.accumulate(dark, axis)
        outside |= np.flip(np.logical_and.accumulate(np.flip(dark, axis), axis), axis)
    outside = _count(outside, 3, 3) > 0
    outside = outside.repeat(_CELL_PX, 0).repeat(_CELL_PX, 1)[: gray.height, : gray.width]
    for edge in (outside, outside[::-1], outside.T, outside.T[::-1]):
        edge[:_CELL_PX] = True
    return outside


def _rules(ink: np.ndarray) -> np.ndarray:
    """Return where (H, W) ink is part of a horizontal line over half the page's width, close to its upper or lower end.

    It may be slanted by a hundredth, and have gaps; letters are higher than a line is thick.
    """
    found = np.zeros_like(ink)
    height, length = len(ink), ink.shape[1] // 2 | 1
    outer = round(height * _OUTER_SHARE)
    for part in (slice(outer), slice(height - outer, height)):
        thin = ink[part] & (_count(ink[part], 3 * _STROKE_PX, 1) <= _STROKE_PX)
        runs = _count(_count(thin, _STROKE_PX, 1) > 0, 1, length) >= 0.9 * length
        found[part] = thin & (_count(runs, 1, length) > 0)
    return found


def _specks(ink: np.ndarray) -> np.ndarray:
    """Return where (H, W) ink is a mark within a square of `_STROKE_PX` that is far from any larger mark."""
    inside = _count(ink, _STROKE_PX, _STROKE_PX)
    alone = (inside > 0) & (inside == _count(ink, _STROKE_PX + 4, _STROKE_PX + 4))
    small = _count(alone, _STROKE_PX, _STROKE_PX) > 0
    return small & (_count(ink & ~small, _ALONE_PX, _ALONE_PX) == 0)


def _count(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Count what is True in the window of `rows` by `columns`, both odd, around each element of (H, W)."""
    counts = mask.astype(np.int32)
    for axis, size in ((0, rows), (1, columns)):
        ends = [(size // 2 + 1, size // 2) if axis == side else (0, 0) for side in (0, 1)]
        sums = np.moveaxis(np.pad(counts, ends).cumsum(axis), axis, 0)
        counts = np.moveaxis(sums[size:] - sums[:-size], 0, axis)
    return counts
