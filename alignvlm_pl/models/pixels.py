"""uint8 tiles of a batch, normalised on the device for the vision encoder.

Batches hold uint8, a quarter of the bytes of float32 in shared memory and on the way to the device. Padding is 0 after
normalisation, which no uint8 value maps to, so every tile has the box that the image fills.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ..errors import DataError
from ..preprocessing.imaging import cut_pixels, load_image
from ..preprocessing.tiling import Tiling


def normalise_tensor(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Normalise uint8 tiles (tiles, 3, H, W) on their device to float32 in [-1, 1], and to 0 outside of the boxes.

    `boxes` (tiles, 4) are left, top, right, bottom of the image within each tile, right and bottom exclusive.

    Raises:
        DataError: There is not one box per tile.
    """
    if boxes.shape != (len(pixels), 4):
        raise DataError(
            f"tile_boxes has shape {tuple(boxes.shape)}, expected {(len(pixels), 4)}: left, upper, right and lower "
            "edge of the image within each tile of pixel_values"
        )
    tiles = pixels.to(torch.float32)
    # Divided by a tensor: for a Python number CUDA multiplies by the reciprocal, which rounds differently.
    tiles.div_(torch.full((), 127.5, device=pixels.device)).sub_(1)
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)
    x = torch.arange(pixels.shape[3], device=pixels.device)
    y = torch.arange(pixels.shape[2], device=pixels.device)
    columns, rows = (x >= left) & (x < right), (y >= top) & (y < bottom)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return tiles.masked_fill_(~inside, 0)


def cut_tiles(image: Image.Image, tiling: Tiling) -> Tensor:
    """Cut an image into normalised tiles (tiles, 3, tile_height, tile_width), see `imaging.cut_pixels`."""
    pixels, boxes = cut_pixels(image, tiling)
    return normalise_tensor(torch.from_numpy(pixels), torch.from_numpy(boxes))


@dataclass
class TileProcessor:
    """Images to normalised tiles, as an image processor of transformers; the settings are saved by the processor."""

    tiling: Tiling
    padding_value = None  # for the pipelines of transformers: tiles are concatenated

    def __call__(self, images: Any) -> BatchFeature:
        """Return `pixel_values` (tiles, 3, H, W) in [-1, 1] and `num_tiles` (images,) of an image or a list of them.

        Raises:
            DataError: An image cannot be read.
        """
        listed = images if isinstance(images, (list, tuple)) else [images]
        empty = torch.zeros(0, 3, self.tiling.tile_height, self.tiling.tile_width)
        tiles = [cut_tiles(load_image(image), self.tiling) for image in listed]
        counts = torch.tensor([len(one) for one in tiles])
        return BatchFeature({"pixel_values": torch.cat([empty, *tiles]), "num_tiles": counts})

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Write nothing: the processor's files have the tiling."""


def at_least_one_tile(tiles: Tensor) -> Tensor:
    """Return tiles (tiles, …), or one of zeros if there are none."""
    return tiles if len(tiles) else tiles.new_zeros((1, *tiles.shape[1:]))


def distinct_tiles(tiles: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the distinct ones of tiles (tiles, …) and, of each tile, which of them it is; None if no two are equal.

    A batch of questions about one page has its tiles once for each question.
    """
    if len(tiles) < 2 or tiles.is_meta:
        return None
    found: dict[float, list[int]] = {}  # mean of a tile -> first tiles that have it
    first = []
    for tile, mean in enumerate(tiles.flatten(1).float().mean(dim=1).tolist()):
        others = found.setdefault(mean, [])
        first.append(next((other for other in others if torch.equal(tiles[other], tiles[tile])), tile))
        if first[-1] == tile:
            others.append(tile)
    kept = sorted(set(first))
    if len(kept) == len(tiles):
        return None
    return tiles[kept], torch.tensor([kept.index(tile) for tile in first], device=tiles.device)


def as_tiles(pixel_values: Tensor, tile_boxes: Tensor | None) -> Tensor:
    """Return tiles (tiles, 3, H, W) for the vision encoder: uint8 ones normalised, floating-point ones unchanged.

    Raises:
        DataError: If uint8 tiles have no boxes, or the tiles have another dtype.
    """
    if pixel_values.is_floating_point():
        return pixel_values
    if pixel_values.dtype != torch.uint8:
        raise DataError(f"pixel_values is of type {pixel_values.dtype}, expected uint8, or floating point in [-1, 1]")
    if tile_boxes is None:
        raise DataError(
            "pixel_values is uint8 but there are no tile_boxes, without which padding looks like black; "
            "pass tile_boxes of the same batch, or normalised pixel_values"
        )
    return normalise_tensor(pixel_values, tile_boxes)
