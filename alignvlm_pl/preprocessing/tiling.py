"""Tiling geometry, without pixels or torch: the grid of tiles for an image, and the source of each tile.

Two published rules: `ovis` chooses the fewest tiles that keep enough of the image's pixels, `internvl` the grid nearest
to the image's aspect ratio. Sizes are in pixels; boxes are (left, top, right, bottom); grids are (rows, cols). All that
work with an image of no pixels raise a DataError.
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise, product
from numbers import Integral
from typing import Any, NamedTuple

from ..errors import ConfigError, DataError, require_known

RULES = ("ovis", "internvl")
THUMBNAILS = ("first", "last", "none")
MAX_TILES = 256  # Of the grid: every grid within `max_tiles` is compared for each new size of image
MAX_TILE_SIDE = 8192  # In pixels: above the input of any vision encoder; boxes of tiles are int16

Box = tuple[float, float, float, float]


class Grid(NamedTuple):
    """Rows and columns of tiles."""

    rows: int
    cols: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Settings for cutting an image into tiles of one size.

    Args:
        rule: `ovis` (covering ratio; each tile keeps its aspect ratio and is padded) or `internvl` (nearest aspect
            ratio; the image is stretched over the grid).
        tile_height: Height of a tile in pixels, the input height of the vision encoder; at most `MAX_TILE_SIDE`.
        tile_width: Width of a tile in pixels, at most `MAX_TILE_SIDE`.
        max_tiles: Maximum number of tiles in the grid, without the thumbnail; at most `MAX_TILES`.
        max_side: Maximum number of rows and of columns; None: limited by `max_tiles` only.
        thumbnail: Position of the full image as an additional tile: `first`, `last` or `none`. An image of a single
            tile has no thumbnail.
        covering_threshold: Share of the image's area (0-1) above which a grid is accepted; `ovis` only.
    """

    rule: str = "ovis"
    tile_height: int = 384
    tile_width: int = 384
    max_tiles: int = 9
    max_side: int | None = None
    thumbnail: str = "first"
    covering_threshold: float = 0.9

    def __post_init__(self) -> None:
        for key, known in (("rule", RULES), ("thumbnail", THUMBNAILS)):
            value = getattr(self, key)
            require_known(value, known, f"tiling.{key} is {value!r}")
        for key in ("tile_height", "tile_width", "max_tiles", "max_side"):
            value = getattr(self, key)
            if key == "max_side" and value is None:
                continue
            most = MAX_TILE_SIDE if key.startswith("tile") else MAX_TILES
            if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= most:
                raise ConfigError(f"tiling.{key} must be a whole number from 1 to {most}, found {value!r:.40}")
            object.__setattr__(self, key, int(value))  # numpy's are not written as JSON
        share = self.covering_threshold
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"tiling.covering_threshold must be a share between 0 and 1, found {share!r}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Tiling":
        """Create from the output of `to_dict`; missing keys take their defaults, an unknown one is a ConfigError."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"tiling is {settings!r:.40}, expected a mapping of its settings")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            require_known(key, known, f"tiling has no setting {key!r}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileBox:
    """Source of one tile in the image, and its position within the encoder's input.

    `left`, `top`, `right` and `bottom` (exclusive) are in pixels of the image: integers under `ovis`, perhaps fractions
    under `internvl`. The source is resized to `resized_width` x `resized_height` pixels, whose upper left corner is at
    (`offset_x`, `offset_y`) of the tile; the rest of the tile is padding.
    """

    left: float
    top: float
    right: float
    bottom: float
    resized_width: int
    resized_height: int
    offset_x: int
    offset_y: int
    is_thumbnail: bool = False

    def to_tile(self, box: Box) -> Box:
        """Map a box from pixels of the image to pixels of this tile, without clipping to the source."""
        x_scale = self.resized_width / (self.right - self.left)
        y_scale = self.resized_height / (self.bottom - self.top)
        return (
            self.offset_x + (box[0] - self.left) * x_scale,
            self.offset_y + (box[1] - self.top) * y_scale,
            self.offset_x + (box[2] - self.left) * x_scale,
            self.offset_y + (box[3] - self.top) * y_scale,
        )

    def to_image(self, box: Box) -> Box:
        """Map a box from pixels of this tile to pixels of the image, clipped to the source."""
        x_scale = (self.right - self.left) / self.resized_width
        y_scale = (self.bottom - self.top) / self.resized_height

        def x(place: float) -> float:
            return self.left + min(max(place - self.offset_x, 0), self.resized_width) * x_scale

        def y(place: float) -> float:
            return self.top + min(max(place - self.offset_y, 0), self.resized_height) * y_scale

        return x(box[0]), y(box[1]), x(box[2]), y(box[3])


@lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, tiling: Tiling) -> Grid:
    """Choose the grid for an image of this size in pixels. Raises a DataError for an image without a pixel."""
    if width < 1 or height < 1:
        raise DataError(f"an image must be at least 1x1 pixels, found width {width} and height {height}")
    return (_covering_grid if tiling.rule == "ovis" else _nearest_grid)(width, height, tiling)


@lru_cache(maxsize=4096)
def plan_tiles(width: int, height: int, tiling: Tiling) -> tuple[TileBox, ...]:
    """Return the tiles of an image in the order of the model's input: row by row, with the thumbnail."""
    tiles = [_tile(box, tiling) for box in _partition(width, height, choose_grid(width, height, tiling), tiling.rule)]
    thumbnail = dataclasses.replace(_tile((0, 0, width, height), tiling), is_thumbnail=True)
    if len(tiles) == 1 or tiling.thumbnail == "none":
        return tuple(tiles)
    return (thumbnail, *tiles) if tiling.thumbnail == "first" else (*tiles, thumbnail)


def token_boxes(
    width: int, height: int, tiling: Tiling, *, grid: tuple[int, int], token_size: tuple[int, int]
) -> list[list[Box]]:
    """Return the boxes of each tile's visual tokens in pixels of the image; those in padding have no area.

    A tile has `grid` rows and columns of tokens, row by row, of `token_size` (height, width) in pixels of the tile.
    """
    tall, wide = token_size
    cells = [(col * wide, row * tall, (col + 1) * wide, (row + 1) * tall) for row, col in product(*map(range, grid))]
    return [[tile.to_image(cell) for cell in cells] for tile in plan_tiles(width, height, tiling)]


def count_tiles(width: int, height: int, tiling: Tiling) -> int:
    """Return the number of tiles of an image, including the thumbnail."""
    rows, cols = choose_grid(width, height, tiling)
    return rows * cols + int(rows * cols > 1 and tiling.thumbnail != "none")


def count_visual_tokens(width: int, height: int, tiling: Tiling, tokens_per_tile: int) -> int:
    """Return the number of visual tokens of an image in the LLM's sequence, `tokens_per_tile` of each tile."""
    return count_tiles(width, height, tiling) * tokens_per_tile


@lru_cache(maxsize=64)
def _candidates(max_tiles: int, max_side: int | None) -> tuple[Grid, ...]:
    """Return all grids within both limits, ordered by rows, then columns (23 grids for 9 tiles)."""
    side = max_side or max_tiles
    return tuple(
        Grid(rows, cols)
        for rows in range(1, min(side, max_tiles) + 1)
        for cols in range(1, min(side, max_tiles // rows) + 1)
    )


def _covering_grid(width: int, height: int, tiling: Tiling) -> Grid:
    """Ovis 1.6, `base_visual_tokenizer.py`, `_get_best_grid`, generalised to tiles that are not square."""
    # A grid with more rows (columns) than the image has pixels would have empty tiles. It covers what the one-row
    # (one-column) grid covers with more tiles, so Ovis never chooses it, and leaving it out changes no result.
    grids = [
        grid for grid in _candidates(tiling.max_tiles, tiling.max_side) if grid.rows <= height and grid.cols <= width
    ]
    covered = {grid: _covering_ratio(width, height, grid, tiling) for grid in grids}
    accepted = [grid for grid in grids if covered[grid] > tiling.covering_threshold]
    # min() returns the first of equals, i.e. in order of enumeration, as Ovis's stable sort does.
    if accepted:
        return min(accepted, key=lambda grid: (grid.rows * grid.cols, -covered[grid]))
    return min(grids, key=lambda grid: (-covered[grid], grid.rows * grid.cols))


def _covering_ratio(width: int, height: int, grid: Grid, tiling: Tiling) -> float:
    """Return the share of the image's area (0-1) that is left after sources larger than the tile are shrunk to fit."""
    # Not sum(), which rounds differently since Python 3.12: for a square image the grids (2, 3) and (3, 2) differ in
    # the last bit only, and the choice must not depend on the Python version.
    area = 0.0
    for box in _partition(width, height, grid, "ovis"):
        area += _covering_area(box, tiling)
    return area / (width * height)


def _covering_area(box: Box, tiling: Tiling) -> float:
    """Return the area of a tile's source in pixels, after shrinking to fit the tile if it is larger."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= tiling.tile_width and height <= tiling.tile_height:
        return width * height
    # Operations in the order of Ovis: ties between grids depend on the last bit.
    if width * tiling.tile_height >= height * tiling.tile_width:
        return tiling.tile_width * (height / width * tiling.tile_width)
    return tiling.tile_height * (width / height * tiling.tile_height)


def _nearest_grid(width: int, height: int, tiling: Tiling) -> Grid:
    """InternVL, `train/dataset.py`, `find_closest_aspect_ratio`, generalised to tiles that are not square.

    InternVL leaves grids of equal area in the order of a Python set; here they are ordered by columns. Up to 24 tiles
    the results are equal (tests/parity/test_tiling_reference.py).
    """
    aspect = width / height
    best, best_difference = Grid(1, 1), float("inf")
    candidates = _candidates(tiling.max_tiles, tiling.max_side)
    for grid in sorted(candidates, key=lambda grid: (grid.rows * grid.cols, grid.cols)):
        difference = abs(aspect - (grid.cols * tiling.tile_width) / (grid.rows * tiling.tile_height))
        canvas_area = tiling.tile_width * tiling.tile_height * grid.rows * grid.cols
        # Of grids with equal aspect ratio the larger is chosen if the image has more than half of its pixels.
        if difference < best_difference or (difference == best_difference and width * height > 0.5 * canvas_area):
            best, best_difference = grid, difference
    return best


def _partition(width: int, height: int, grid: Grid, rule: str) -> list[Box]:
    """Divide into boxes, row by row: `ovis` at whole pixels, the last row and column with the rest; else evenly."""

    def edges(length: int, parts: int) -> list[float]:
        if rule == "ovis":
            return [*(part * (length // parts) for part in range(parts)), length]
        return [length * part / parts for part in range(parts + 1)]

    xs, ys = edges(width, grid.cols), edges(height, grid.rows)
    return [(left, top, right, bottom) for top, bottom in pairwise(ys) for left, right in pairwise(xs)]


def _tile(box: Box, tiling: Tiling) -> TileBox:
    """Stretch a source to fill the tile (InternVL, `dynamic_preprocess`); under `ovis` keep its ratio."""
    width, height = box[2] - box[0], box[3] - box[1]
    new_width, new_height = tiling.tile_width, tiling.tile_height
    # Compared as integer products, so an equal ratio fills the tile. Ovis truncates; max(1, ...) is added because a
    # strip of 4000x10 would be resized to a height of 0.
    if tiling.rule == "ovis" and width * tiling.tile_height > height * tiling.tile_width:
        new_height = max(1, min(new_height, int(height / width * new_width)))
    elif tiling.rule == "ovis" and width * tiling.tile_height < height * tiling.tile_width:
        new_width = max(1, min(new_width, int(width / height * new_height)))
    return TileBox(
        left=box[0],
        top=box[1],
        right=box[2],
        bottom=box[3],
        resized_width=new_width,
        resized_height=new_height,
        offset_x=(tiling.tile_width - new_width) // 2,
        offset_y=(tiling.tile_height - new_height) // 2,
    )
