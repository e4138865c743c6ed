"""Tiles as batches carry them, and as the vision encoder takes them.

Batches carry uint8: a quarter of the bytes of float32, in the memory that worker processes share and on the way to the
device. Padding is 0 after normalisation, which no uint8 value becomes, so each tile has the box of its real pixels.
"""

import torch
from torch import Tensor

from ..errors import DataError
from ..preprocessing.imaging import HALF_RANGE


def normalise(pixels: Tensor, boxes: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise on the device where the pixels are; on a CPU bit for bit as `imaging.normalise` does.

    Args:
        pixels: uint8 (tiles, 3, H, W).
        boxes: Whole numbers (tiles, 4): left, upper, right and lower edge of each tile's real pixels, the last two
            exclusive.
        dtype: Of the result; the arithmetic is in float32 whatever it is.

    Returns:
        (tiles, 3, H, W) in [-1, 1], 0 outside of the boxes.

    Raises:
        DataError: The boxes are not one for each tile.
    """
    if boxes.shape != (len(pixels), 4):
        raise DataError(
            f"tile_boxes has shape {tuple(boxes.shape)}, expected {(len(pixels), 4)}: left, upper, right and lower "
            "edge of the real pixels of each tile in pixel_values"
        )
    tiles = pixels.to(torch.float32)
    # A tensor, not a number: by a number CUDA multiplies with its reciprocal, which rounds differently.
    tiles.div_(torch.full((), HALF_RANGE, device=pixels.device)).sub_(1)
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)
    x = torch.arange(pixels.shape[3], device=pixels.device)
    y = torch.arange(pixels.shape[2], device=pixels.device)
    columns, rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return tiles.masked_fill_(~inside, 0).to(dtype)


def as_tiles(pixel_values: Tensor, tile_boxes: Tensor | None) -> Tensor:
    """Tiles for the vision encoder: floating-point ones as they are, uint8 ones normalised.

    Args:
        pixel_values: (tiles, 3, H, W).
        tile_boxes: (tiles, 4), see `normalise`; not looked at where the tiles are normalised already.

    Raises:
        DataError: If uint8 tiles come without their boxes, or the tiles are of another type.
    """
    if pixel_values.is_floating_point():
        return pixel_values
    if pixel_values.dtype != torch.uint8:
        raise DataError(
            f"pixel_values is of type {pixel_values.dtype}, expected uint8, or floating point in [-1, 1]"
        )
    if tile_boxes is None:
        raise DataError(
            "pixel_values is uint8 but there are no tile_boxes, without which padding cannot be told from black; "
            "pass tile_boxes of the same batch, or normalised pixel_values"
        )
    return normalise(pixel_values, tile_boxes)
