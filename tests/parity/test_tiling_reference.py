"""Both tiling rules against a second, plain statement of what their authors' code does (square tiles).

Written from a description of Ovis 1.6 `base_visual_tokenizer.py` and InternVL `train/dataset.py`, in another
form than alignvlm_pl.preprocessing.tiling: loops over crops with explicit sums, and pixels through Pillow a
tile at a time.
"""

import random
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.preprocessing.tiling import Tiling, choose_grid


def ovis_crops(width, height, rows, cols):
    crops = []
    for row in range(rows):
        for col in range(cols):
            left, upper = col * (width // cols), row * (height // rows)
            right = width if col == cols - 1 else left + width // cols
            lower = height if row == rows - 1 else upper + height // rows
            crops.append((left, upper, right, lower))
    return crops


def ovis_grid(width, height, side, most, threshold):
    scored = []
    for rows in range(1, most + 1):
        for cols in range(1, most + 1):
            if rows * cols > most:
                continue
            kept = 0.0
            for left, upper, right, lower in ovis_crops(width, height, rows, cols):
                long, short = max(right - left, lower - upper), min(right - left, lower - upper)
                if long > side:
                    long, short = side, short / long * side
                kept += long * short
            scored.append((rows * cols, kept / (width * height), (rows, cols)))
    enough = [entry for entry in scored if entry[1] > threshold]
    if enough:
        enough.sort(key=lambda entry: entry[1], reverse=True)
        enough.sort(key=lambda entry: entry[0])
        return enough[0][2]
    scored.sort(key=lambda entry: entry[0])
    scored.sort(key=lambda entry: entry[1], reverse=True)
    return scored[0][2]


def internvl_grid(width, height, side, most):
    ratios = sorted(
        {(cols, rows) for cols in range(1, most + 1) for rows in range(1, most + 1) if cols * rows <= most},
        key=lambda ratio: ratio[0] * ratio[1],
    )
    closest, smallest = (1, 1), float("inf")
    for cols, rows in ratios:
        off = abs(width / height - cols / rows)
        if off < smallest:
            closest, smallest = (cols, rows), off
        elif off == smallest and width * height > 0.5 * side * side * cols * rows:
            closest = (cols, rows)
    return closest[1], closest[0]


def random_sizes(seed, number):
    """Small and large, strips, whole multiples of 384, and sizes on the border between two aspect ratios."""
    rng = random.Random(seed)
    for index in range(number):
        kind = index % 5
        if kind == 0:
            yield rng.randint(1, 4000), rng.randint(1, 4000)
        elif kind == 1:
            yield rng.randint(1, 500), rng.randint(1, 500)
        elif kind == 2:
            yield rng.randint(1, 20), rng.randint(1, 20000)
        elif kind == 3:
            yield 384 * rng.randint(1, 9) + rng.randint(-1, 1), 384 * rng.randint(1, 9) + rng.randint(-1, 1)
        else:
            first, second = (Fraction(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(2))
            border, scale = (first + second) / 2, rng.randint(1, 40)
            yield border.numerator * scale, border.denominator * scale


def test_ovis_grids():
    for width, height in random_sizes(11, 3000):
        assert choose_grid(width, height, Tiling()) == ovis_grid(width, height, 384, 9, 0.9), (width, height)


def test_ovis_grids_with_other_settings():
    rng = random.Random(12)
    for width, height in random_sizes(13, 800):
        side, most, threshold = rng.randint(8, 500), rng.randint(1, 12), rng.choice([0.3, 0.75, 0.95, 1.0])
        tiling = Tiling(tile_height=side, tile_width=side, max_tiles=most, covering_threshold=threshold)
        assert choose_grid(width, height, tiling) == ovis_grid(width, height, side, most, threshold), (
            width,
            height,
            tiling,
        )


def test_ovis_tie_is_decided_by_the_last_bit():
    """Both grids of six tiles are good enough; their ratios differ by two units in the last place."""
    tiling = Tiling(tile_height=11, tile_width=11, covering_threshold=0.746)
    assert ovis_grid(25, 25, 11, 9, 0.746) == (3, 2)
    assert choose_grid(25, 25, tiling) == (3, 2)


def test_internvl_grids():
    rng = random.Random(14)
    for width, height in random_sizes(15, 4000):
        side, most = rng.choice([(384, 9), (448, 12), (100, 6), (384, 1)])
        tiling = Tiling(rule="internvl", tile_height=side, tile_width=side, max_tiles=most)
        assert choose_grid(width, height, tiling) == internvl_grid(width, height, side, most), (width, height)


@pytest.mark.parametrize("most", range(1, 25))
def test_grids_of_equal_area_never_compete(most):
    """Why the order that we add among InternVL's grids of equal area changes no result.

    Two grids tie only at the aspect ratio midway between theirs, and there a third one is strictly nearer.
    """
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    for first, second in combinations(grids, 2):
        if first[0] * first[1] != second[0] * second[1]:
            continue
        border = (Fraction(*first) + Fraction(*second)) / 2
        nearest = min(abs(Fraction(*grid) - border) for grid in grids)
        assert nearest < abs(Fraction(*first) - border), (first, second)


def noise(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(image):
    return (np.asarray(image, dtype=np.float64) / 255 - 0.5) / 0.5


def ovis_pixels(image, side):
    width, height = image.size
    crops = ovis_crops(width, height, *ovis_grid(width, height, side, 9, 0.9))
    if len(crops) > 1:
        crops.insert(0, (0, 0, width, height))
    tiles = np.zeros((len(crops), side, side, 3))
    for tile, crop in zip(tiles, crops, strict=True):
        piece = image.crop(crop)
        w, h = piece.size
        new_w = side if w >= h else max(1, int(w / h * side))
        new_h = side if h >= w else max(1, int(h / w * side))
        x, y = (side - new_w) // 2, (side - new_h) // 2
        tile[y : y + new_h, x : x + new_w] = normalised(piece.resize((new_w, new_h), Image.Resampling.BICUBIC))
    return tiles


def internvl_pixels(image, side):
    rows, cols = internvl_grid(*image.size, side, 9)
    canvas = image.resize((side * cols, side * rows), Image.Resampling.BICUBIC)
    tiles = []
    for index in range(rows * cols):
        x, y = index % cols * side, index // cols * side
        tiles.append(normalised(canvas.crop((x, y, x + side, y + side))))
    if len(tiles) > 1:
        tiles.append(normalised(image.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(tiles)


@pytest.mark.parametrize(
    ("rule", "thumbnail", "pixels"),
    [
        ("ovis", "first", ovis_pixels),
        ("internvl", "last", internvl_pixels),
    ],
)
def test_pixels(rule, thumbnail, pixels):
    rng = np.random.default_rng(16)
    tiling = Tiling(rule=rule, tile_height=48, tile_width=48, thumbnail=thumbnail)
    for width, height in [(48, 48), (100, 77), (30, 20), (212, 275), (400, 30), (5, 300), (1, 1), (144, 144)]:
        image = noise(rng, width, height)
        ours = cut_tiles(image, tiling).numpy()
        assert ours.dtype == np.float32
        # Same 8-bit pixels on both sides; what is left is float32 rounding, 6e-8 at worst.
        np.testing.assert_allclose(ours, pixels(image, 48).transpose(0, 3, 1, 2), atol=2e-7)
