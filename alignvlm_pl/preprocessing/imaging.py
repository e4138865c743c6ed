"""Read image files, which are not trusted, and cut images into tiles. Pillow and numpy only."""

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ConfigError, DataError
from ..utils.text_files import HEAD_BYTES, content_kind
from .images.metadata import essential_bytes
from .images.source import describe_source, is_number, resolve_source
from .tiling import Grid, TileBox, Tiling, choose_grid, plan_tiles

MAX_PIXELS = 100_000_000
# The longest side in the JPEG format. A file of 60 bytes may declare 90 million rows of one pixel, for which Pillow
# allocates a gigabyte of row pointers.
MAX_SIDE = 65_535

# An explicit list: Pillow also knows formats that run other programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA", "PCX")
_ORIENTATION_TAG = 0x0112
_TIFF_SIZE = (0x0100, 0x0101)
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS, timeout: float | None = None
) -> Image.Image:
    """Turn an image in any form into an upright RGB image: the one way by which images enter.

    EXIF orientation is applied, transparency is put on white, of an animation or a file of several pages the first is
    taken. A file's format is known by its content. Loading the result again returns it unchanged.

    Args:
        source: A file's bytes, a path, a URL, base64, a PIL image, an array or a tensor; see `images.source`.
        name: Name in error messages, e.g. shard and member; default: the path, or the form of the source.
        max_pixels: Maximum of width times height; Pillow's own limit (179 million) applies as well.
        timeout: Seconds to wait for the server of an http(s) URL.

    Raises:
        DataError: The form is unknown, no such file, not an image of a known format, too large, truncated or damaged.
        ConfigError: `max_pixels` or `timeout` is no number, or out of range.
    """
    if not (is_number(max_pixels) and max_pixels >= 1):
        raise ConfigError(f"max_pixels={max_pixels!r:.40}, expected a number of at least 1")
    name = describe_source(source) if name is None else name
    content = resolve_source(source, name, timeout=timeout)
    with warnings.catch_warnings():
        # Pillow warns about large images, which max_pixels covers, and about damaged metadata, which is unused.
        warnings.simplefilter("ignore")
        if isinstance(content, Image.Image):  # the caller's: not closed
            _check_size(content, name, max_pixels)
            return _decode(content, name)
        with _open(essential_bytes(content), name) as image:
            _check_size(image, name, max_pixels)
            return _decode(image, name)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: image of {width}x{height} pixels, expected at most {max_pixels} in all "
            "(max_pixels); scale the image down or raise max_pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise DataError(
            f"{name}: image of {width}x{height} pixels, expected sides of at most {MAX_SIDE}; "
            "scale the image down or remove the sample"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: transparency on white, 16 bits scaled to 8, CMYK and palettes converted.

    32-bit integers and floats have no defined range: their minimum becomes black, their maximum white. NaN or infinite
    values raise a DataError.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _deep_to_gray(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":  # premultiplied grey has no direct way to RGBA
            image = image.convert("LA")
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def cut_pixels(image: Image.Image, tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    """Cut an image of any mode into tiles, in the order of `plan_tiles`; pixels are resampled bicubically.

    Returns tiles (tiles, 3, tile_height, tile_width) uint8, RGB, 0 where padded, to be normalised on the device by
    `models.pixels`; and boxes (tiles, 4) int16: left, top, right, bottom (both exclusive) of the image in each tile.
    """
    image = to_rgb(image)
    plan = plan_tiles(*image.size, tiling)
    # Not zeroed: most tiles have no padding.
    out = np.empty((len(plan), 3, tiling.tile_height, tiling.tile_width), dtype=np.uint8)
    boxes = np.empty((len(plan), 4), dtype=np.int16)
    if tiling.rule == "ovis":
        crops = _fitted_tiles(image, plan)
    else:
        crops = _stretched_tiles(image, plan, choose_grid(*image.size, tiling), tiling)
    for tile, edges, box, crop in zip(out, boxes, plan, crops, strict=True):
        x, y, width, height = box.offset_x, box.offset_y, box.resized_width, box.resized_height
        edges[:] = x, y, x + width, y + height
        _clear_outside(tile, edges)
        for channel, band in zip(tile, "RGB", strict=True):
            # Pillow stores pixels interleaved; extracting one band at a time is faster than a transpose.
            packed = np.frombuffer(crop.tobytes("raw", band), dtype=np.uint8)
            channel[y : y + height, x : x + width] = packed.reshape(height, width)
    return out, boxes


def join_tiles(pixels: np.ndarray, size: tuple[int, int], tiling: Tiling, *, longest: int) -> Image.Image:
    """Return an image of `size` (width, height) made of its uint8 tiles, the inverse of `cut_pixels` up to resampling.

    A larger one is reduced to `longest` pixels on its longest side.
    """
    scale = min(1.0, longest / max(size))
    page = Image.new("RGB", (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
    for tile, box in zip(pixels, plan_tiles(*size, tiling), strict=True):
        if not box.is_thumbnail:
            x, y = box.offset_x, box.offset_y
            shown = tile[:, y : y + box.resized_height, x : x + box.resized_width].transpose(1, 2, 0)
            left, top, right, bottom = (round(edge * scale) for edge in (box.left, box.top, box.right, box.bottom))
            place = (max(1, right - left), max(1, bottom - top))
            page.paste(Image.fromarray(np.ascontiguousarray(shown)).resize(place), (left, top))
    return page


def _clear_outside(tile: np.ndarray, edges: np.ndarray) -> None:
    """Set a tile (3, H, W) to 0 outside of its box, in place."""
    left, top, right, bottom = edges.tolist()
    for padding in (tile[:, :top], tile[:, bottom:], tile[:, :, :left], tile[:, :, right:]):
        padding.fill(0)


def _fitted_tiles(image: Image.Image, plan: Sequence[TileBox]) -> list[Image.Image]:
    crops = []
    for box in plan:
        # Cropped before resizing: resize(box=...) would filter across the tile's border.
        edges = (box.left, box.top, box.right, box.bottom)
        source = image if edges == (0, 0, *image.size) else image.crop(edges)
        size = (box.resized_width, box.resized_height)
        # Pillow copies even if the size is unchanged.
        crops.append(source if source.size == size else source.resize(size, Image.Resampling.BICUBIC))
    return crops


def _stretched_tiles(image: Image.Image, plan: Sequence[TileBox], grid: Grid, tiling: Tiling) -> list[Image.Image]:
    # Resized as a whole and then cut, as in InternVL: the filter does cross the borders.
    rows, cols = grid
    width, height = tiling.tile_width, tiling.tile_height
    canvas = image.resize((width * cols, height * rows), Image.Resampling.BICUBIC)
    corners = ((col * width, row * height) for row in range(rows) for col in range(cols))
    cells = (canvas.crop((x, y, x + width, y + height)) for x, y in corners)
    return [
        image.resize((width, height), Image.Resampling.BICUBIC) if box.is_thumbnail else next(cells) for box in plan
    ]


@lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(known for known in _FORMATS if known in Image.OPEN)


def read_header(content: bytes, *, name: str) -> tuple[str, tuple[int, int]]:
    """Return the format of an image as Pillow calls it, and its (width, height) in pixels as it is seen.

    Raises a DataError for what is not an image of a known format.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(essential_bytes(content), name) as image:
            width, height = image.size
            if tags := getattr(image, "tag_v2", None):  # of a TIFF, whose size newer Pillow swaps when it opens it
                width, height = (int(tags[tag]) for tag in _TIFF_SIZE)
            return str(image.format), (height, width) if _orientation(image) >= 5 else (width, height)


def has_more_pages(content: bytes, *, name: str) -> bool:
    """Return whether a file is a TIFF with a second page, which `load_image` does not read."""
    with warnings.catch_warnings(), _open(content, name) as image:
        warnings.simplefilter("ignore")
        try:
            image.seek(1)
        except Exception:  # the only page; or as in _open
            return False
        return image.format == "TIFF"


def _open(content: bytes, name: str) -> Image.Image:
    if not content:
        raise DataError(f"{name}: the image file is empty; write it again or remove the sample")
    try:
        return Image.open(io.BytesIO(content), formats=_known_formats())
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: too large to decode ({error}); scale it down") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise undocumented exceptions on hostile bytes
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        kind = content_kind(content[:HEAD_BYTES])
        found = f"{len(content)} bytes starting with {content[:8]!r}{kind and ': '}{kind}"
        raise DataError(
            f"{name}: not an image that can be read ({found}){why}; known formats: {', '.join(_known_formats())}"
        ) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        orientation = _orientation(image)
        rgb = to_rgb(image)
    except MemoryError:
        raise
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # as in _open
        raise DataError(
            f"{name}: {image.format} image of {image.size[0]}x{image.size[1]} pixels does not decode "
            f"({error}); the file is truncated or damaged"
        ) from error
    if orientation in _ORIENTATIONS:
        rgb = rgb.transpose(_ORIENTATIONS[orientation])
        rgb.info.clear()  # it holds the EXIF block, by which a second call would turn the image again
    # Without conversion this is the opened image itself; its pixels are loaded and stay valid after the file is closed.
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        # Not the method of PNG, which decodes all pixels to find an EXIF after them; it stands before them here.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # as in _open
        return 1
    return value if isinstance(value, int) and value in _ORIENTATIONS else 1


def _deep_to_gray(image: Image.Image) -> Image.Image:
    """Scale 16-bit and 32-bit grey to 8 bits; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.float64)
    if invalid := values.size - int(np.isfinite(values).sum()):
        raise DataError(
            f"{invalid} of the {values.size} pixels of an image of mode {image.mode} are NaN or infinite; give them a "
            "finite value, or leave the image out"
        )
    # Older Pillow opens 16-bit PNG and PGM as mode "I"; these formats have at most 16 bits.
    if image.mode.startswith("I;16") or getattr(image, "format", None) in ("PNG", "PPM"):
        low, high = 0.0, 65535.0
    else:
        low, high = float(values.min()), float(values.max())
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.rint((values - low) * scale).astype(np.uint8))
