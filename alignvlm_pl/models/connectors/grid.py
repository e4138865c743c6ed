"""Tokens of a tile as a picture: rows, columns, and squares of tokens joined to one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigError

Grid = tuple[int, int]
"""Rows and columns of the vision tokens of one tile, which follow each other row by row."""


def check_grid(tokens: int, grid: Grid) -> None:
    """Refuse tokens that do not fill the grid.

    Raises:
        ConfigError: Naming both numbers.
    """
    rows, columns = grid
    if tokens != rows * columns:
        raise ConfigError(
            f"the connector reads a grid of {rows} x {columns} = {rows * columns} tokens, the vision tower gives "
            f"{tokens}; a class token is not part of a grid, and tiles must have the size in `tiling`"
        )


def shuffled_grid(grid: Grid, side: int) -> Grid:
    """Grid after squares of `side` x `side` tokens were joined; a square at the edge may be incomplete."""
    rows, columns = grid
    return -(-rows // side), -(-columns // side)


def join_squares(features: Tensor, grid: Grid, side: int) -> Tensor:
    """Join squares of tokens, side by side along the width (space to depth, "pixel shuffle").

    The right and the lower edge are filled up with zeros, as Ovis does: 27 columns in squares of 2 become 28, so that
    no token is lost.

    Args:
        features: (tiles, rows · columns, d).
        grid: Rows and columns.
        side: Tokens along the side of a square; 1 changes nothing.

    Returns:
        (tiles, ceil(rows / side) · ceil(columns / side), side² · d); within a token the square's row by row.

    Raises:
        ConfigError: If the tokens do not fill the grid.
    """
    if side == 1:
        return features
    check_grid(features.shape[1], grid)
    height, width = shuffled_grid(grid, side)
    picture = features.unflatten(1, grid)
    picture = F.pad(picture, (0, 0, 0, width * side - grid[1], 0, height * side - grid[0]))
    squares = picture.unflatten(2, (width, side)).unflatten(1, (height, side)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def to_picture(features: Tensor, grid: Grid) -> Tensor:
    """Tokens (tiles, rows · columns, d) as pictures (tiles, d, rows, columns).

    Raises:
        ConfigError: If the tokens do not fill the grid.
    """
    check_grid(features.shape[1], grid)
    return features.transpose(1, 2).unflatten(2, grid)


def to_tokens(picture: Tensor) -> Tensor:
    """Pictures (tiles, d, rows, columns) as tokens (tiles, rows · columns, d)."""
    return picture.flatten(2).transpose(1, 2)


def repeat_for(tiles: Tensor, vectors: Tensor) -> Tensor:
    """The same `vectors` (n, D) for each of `tiles` (tiles, tokens, D), in their precision: (tiles, n, D)."""
    return vectors.to(tiles.dtype).expand(len(tiles), *vectors.shape)


def append(tokens: Tensor, vectors: Tensor) -> Tensor:
    """Put the same `vectors` (n, D) behind the tokens (tiles, tokens, D) of every tile."""
    return torch.cat([tokens, repeat_for(tokens, vectors)], dim=1)
