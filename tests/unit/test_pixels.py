"""Tiles as uint8 with the boxes of their real pixels, and the one rule that normalises them."""

import numpy as np
import pytest
import torch
from PIL import Image

from alignvlm_pl.errors import DataError
from alignvlm_pl.models.pixels import as_tiles, cut_tiles, distinct_tiles, normalise_tensor
from alignvlm_pl.models.processing import concatenate_filled
from alignvlm_pl.preprocessing.imaging import cut_pixels
from alignvlm_pl.preprocessing.tiling import Tiling, choose_grid, plan_tiles

SIZES = [(97, 31), (31, 200), (1, 1), (130, 129), (57, 900), (56, 42), (113, 112)]


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiles_by_hand(image: Image.Image, tiling: Tiling) -> np.ndarray:
    """Float tiles, piece by piece and pixels interleaved; padding stays at the 0 that it starts with."""
    plan = plan_tiles(*image.size, tiling)
    out = np.zeros((len(plan), 3, tiling.tile_height, tiling.tile_width), dtype=np.float32)
    rows, cols = choose_grid(*image.size, tiling)
    canvas = image.resize((cols * tiling.tile_width, rows * tiling.tile_height), Image.Resampling.BICUBIC)
    corners = [(col * tiling.tile_width, row * tiling.tile_height) for row in range(rows) for col in range(cols)]
    for tile, box in zip(out, plan, strict=True):
        width, height, x, y = box.resized_width, box.resized_height, box.offset_x, box.offset_y
        if tiling.rule == "internvl" and not box.is_thumbnail:
            left, top = corners.pop(0)
            piece = canvas.crop((left, top, left + width, top + height))
        else:
            source = image.crop((box.left, box.top, box.right, box.bottom))
            piece = source.resize((width, height), Image.Resampling.BICUBIC)
        values = np.asarray(piece, dtype=np.float32) / np.float32(127.5) - np.float32(1)
        tile[:, y : y + height, x : x + width] = values.transpose(2, 0, 1)
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("thumbnail", ["first", "last", "none"])
@pytest.mark.parametrize("rule", ["ovis", "internvl"])
def test_tiles_have_the_bits_of_tiles_cut_by_hand(rule, thumbnail, size):
    tiling = Tiling(rule=rule, thumbnail=thumbnail, tile_height=56, tile_width=42)
    expected = tiles_by_hand(noise(*size), tiling)
    pixels, boxes = cut_pixels(noise(*size), tiling)
    assert (pixels.dtype, boxes.dtype, boxes.shape) == (np.uint8, np.int16, (len(expected), 4))
    tiles = cut_tiles(noise(*size), tiling).numpy()
    assert tiles.dtype == np.float32
    assert tiles.tobytes() == expected.tobytes()


def test_boxes_hold_the_real_pixels_and_the_rest_is_zero():
    pixels, boxes = cut_pixels(Image.new("RGB", (20, 10), (255, 0, 51)), Tiling(tile_height=40, tile_width=40))
    assert boxes.tolist() == [[0, 10, 40, 30]]
    assert (pixels[0, :, 10:30] == np.array([255, 0, 51]).reshape(3, 1, 1)).all()
    assert not pixels[0, :, :10].any()
    assert not pixels[0, :, 30:].any()


def test_black_is_not_padding():
    """Both are 0 as uint8; only the box tells them apart."""
    pixels = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    tiles = normalise_tensor(pixels, torch.tensor([[1, 1, 3, 4], [0, 0, 5, 4]], dtype=torch.int16))
    expected = torch.zeros(2, 3, 4, 5)
    expected[0, :, 1:4, 1:3] = -1
    expected[1] = -1
    assert torch.equal(tiles, expected)


def test_normalised_tiles_pass_as_they_are_and_others_need_their_boxes():
    tiles = torch.zeros(2, 3, 4, 4)
    assert as_tiles(tiles, None) is tiles
    assert as_tiles(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 4)).shape == (0, 3, 4, 4)
    with pytest.raises(DataError, match="pixel_values is uint8 but there are no tile_boxes"):
        as_tiles(tiles.byte(), None)
    with pytest.raises(DataError, match=r"tile_boxes has shape \(1, 4\), expected \(2, 4\)"):
        as_tiles(tiles.byte(), torch.zeros(1, 4))
    with pytest.raises(DataError, match=r"pixel_values is of type torch.int64, expected uint8, or floating"):
        as_tiles(tiles.long(), torch.zeros(2, 4))


def test_tiles_are_joined_along_their_first_axis():
    arrays = [np.full((count, 3, 2, 2), count, dtype=np.uint8) for count in (2, 0, 1)]
    joined = concatenate_filled(arrays)
    assert (joined.dtype, joined[:, 0, 0, 0].tolist()) == (np.uint8, [2, 2, 1])
    assert concatenate_filled(arrays[:2]) is arrays[0]
    assert concatenate_filled(arrays[1:2]).shape == (0, 3, 2, 2)


def test_equal_tiles_are_found_once() -> None:
    a, b = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mirrored = a.flip(-1)  # of equal mean, but another tile
    distinct, rows = distinct_tiles(torch.stack([a, b, mirrored, a, b, a]))
    assert torch.equal(distinct, torch.stack([a, b, mirrored]))
    assert rows.tolist() == [0, 1, 2, 0, 1, 0]
    assert distinct_tiles(torch.stack([a, b, mirrored])) is None
    assert distinct_tiles(a[None]) is None
