"""The grid of a tile's vision tokens: checks, feature maps and pixel shuffle."""

from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError

TokenGrid = tuple[int, int]
"""Rows and columns of the vision tokens of one tile, in row-major order."""


def check_grid(tokens: int, grid: TokenGrid) -> None:
    """Raise a `ConfigError` if the number of tokens is not rows · columns."""
    rows, columns = grid
    if tokens != rows * columns:
        raise ConfigError(
            f"the connector reads a grid of {rows} x {columns} = {rows * columns} tokens, the vision tower gives "
            f"{tokens}; a class token is not part of a grid, and tiles must have the size in `tiling`"
        )


def shuffled_grid(grid: TokenGrid, factor: int) -> TokenGrid:
    """Return the grid after `pixel_shuffle` by `factor`, rounded up."""
    rows, columns = grid
    return -(-rows // factor), -(-columns // factor)


def pixel_shuffle(features: Tensor, grid: TokenGrid, factor: int) -> Tensor:
    """Concatenate blocks of `factor` x `factor` tokens along the width (space to depth), in row-major order.

    (tiles, rows · columns, d) become (tiles, ceil(rows / factor) · ceil(columns / factor), factor² · d): the grid is
    padded with zeros on the right and below, as in Ovis, so that no token is lost.

    Raises:
        ConfigError: If the tokens do not fill the grid.
    """
    if factor == 1:
        return features
    check_grid(features.shape[1], grid)
    height, width = shuffled_grid(grid, factor)
    feature_map = features.unflatten(1, grid)
    feature_map = F.pad(feature_map, (0, 0, 0, width * factor - grid[1], 0, height * factor - grid[0]))
    blocks = feature_map.unflatten(2, (width, factor)).unflatten(1, (height, factor)).transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2)


def to_feature_map(features: Tensor, grid: TokenGrid) -> Tensor:
    """Reshape tokens (tiles, rows · columns, d) to feature maps (tiles, d, rows, columns), after `check_grid`."""
    check_grid(features.shape[1], grid)
    return features.transpose(1, 2).unflatten(2, grid)


def to_tokens(feature_map: Tensor) -> Tensor:
    """Reshape feature maps (tiles, d, rows, columns) to tokens (tiles, rows · columns, d)."""
    return feature_map.flatten(2).transpose(1, 2)


def expand_to_tiles(tiles: Tensor, vectors: Tensor) -> Tensor:
    """Expand `vectors` (n, D) to (tiles, n, D), in number and dtype of `tiles` (tiles, tokens, D)."""
    return vectors.to(tiles.dtype).expand(len(tiles), *vectors.shape)
