"""Grids, boxes and token counts: worked examples, properties over random sizes, and refused settings."""

import dataclasses
import random

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError, DataError
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.preprocessing.tiling import (
    MAX_TILES,
    RULES,
    TileBox,
    Tiling,
    choose_grid,
    count_tiles,
    count_visual_tokens,
    plan_tiles,
)

# Width, height; Ovis rows, cols and tokens; InternVL rows, cols and tokens: side 384, at most 9 tiles, 729
# tokens a tile, thumbnail included. Computed with the two authors' own code.
WORKED = [
    (384, 384, (1, 1), 729, (1, 1), 729),
    (385, 385, (1, 1), 729, (1, 1), 729),
    (300, 200, (1, 1), 729, (2, 3), 5103),
    (768, 768, (2, 2), 3645, (2, 2), 3645),
    (1000, 1000, (3, 3), 7290, (3, 3), 7290),
    (1700, 2200, (3, 3), 7290, (3, 2), 5103),
    (1240, 1754, (3, 3), 7290, (3, 2), 5103),
    (850, 1100, (3, 3), 7290, (3, 2), 5103),
    (2550, 3300, (3, 3), 7290, (3, 2), 5103),
    (1600, 900, (2, 4), 6561, (2, 4), 6561),
    (3000, 600, (1, 5), 4374, (1, 5), 4374),
    (4000, 300, (1, 9), 7290, (1, 9), 7290),
    (100, 900, (3, 1), 2916, (9, 1), 7290),
]


@pytest.mark.parametrize(("width", "height", "grid", "tokens", "_internvl", "_tokens"), WORKED)
def test_ovis_worked_examples(width, height, grid, tokens, _internvl, _tokens):
    tiling = Tiling(rule="ovis", thumbnail="first")
    assert choose_grid(width, height, tiling) == grid
    assert count_visual_tokens(width, height, tiling, 729) == tokens


@pytest.mark.parametrize(("width", "height", "_ovis", "_tokens", "grid", "tokens"), WORKED)
def test_internvl_worked_examples(width, height, _ovis, _tokens, grid, tokens):
    tiling = Tiling(rule="internvl", thumbnail="last")
    assert choose_grid(width, height, tiling) == grid
    assert count_visual_tokens(width, height, tiling, 729) == tokens


def test_defaults_are_those_of_the_paper():
    assert Tiling() == Tiling(
        rule="ovis",
        tile_height=384,
        tile_width=384,
        max_tiles=9,
        thumbnail="first",
        covering_threshold=0.9,
    )


def random_tiling(rng: random.Random, *, side: int = 96) -> Tiling:
    return Tiling(
        rule=rng.choice(["ovis", "internvl"]),
        tile_height=rng.randint(1, side),
        tile_width=rng.randint(1, side),
        max_tiles=rng.randint(1, 12),
        max_side=rng.choice([None, 1, 2, 5]),
        thumbnail=rng.choice(["first", "last", "none"]),
        covering_threshold=rng.choice([0.0, 0.5, 0.9, 1.0]),
    )


@pytest.mark.parametrize(("size", "grid"), [((4000, 300), (1, 6)), ((300, 4000), (6, 1)), ((1700, 2200), (3, 3))])
def test_max_side_limits_rows_and_columns(size, grid):
    # Without it the first two are cut into nine tiles in a row (Ovis's own grids, test_tiling_reference.py).
    assert choose_grid(*size, Tiling(max_side=6)) == grid
    assert choose_grid(*size, Tiling()) == ((3, 3) if grid == (3, 3) else tuple(9 if n == 6 else n for n in grid))


def test_properties_of_plans():
    rng = random.Random(1)
    for _ in range(1500):
        tiling = random_tiling(rng)
        width, height = rng.randint(1, 700), rng.randint(1, 700)
        case = (width, height, tiling)
        grid = choose_grid(width, height, tiling)
        plan = plan_tiles(width, height, tiling)
        tiles = [box for box in plan if not box.is_thumbnail]
        assert len(plan) == count_tiles(width, height, tiling), case
        assert len(tiles) == grid.rows * grid.cols <= tiling.max_tiles, case
        assert max(grid) <= (tiling.max_side or tiling.max_tiles), case
        assert_thumbnail(plan, tiles, tiling, width, height)
        assert sum((b.right - b.left) * (b.bottom - b.top) for b in tiles) == pytest.approx(width * height), case
        for index, box in enumerate(tiles):
            row, col = divmod(index, grid.cols)
            if col:
                assert (box.left, box.top) == (tiles[index - 1].right, tiles[index - 1].top), case
            if row:
                assert box.top == tiles[index - grid.cols].bottom, case
        for box in plan:
            assert 0 <= box.left < box.right <= width, case
            assert 0 <= box.top < box.bottom <= height, case
            assert 0 <= box.offset_x < box.offset_x + box.resized_width <= tiling.tile_width, case
            assert 0 <= box.offset_y < box.offset_y + box.resized_height <= tiling.tile_height, case


def assert_thumbnail(plan, tiles, tiling, width, height):
    thumbnails = [index for index, box in enumerate(plan) if box.is_thumbnail]
    if len(tiles) == 1 or tiling.thumbnail == "none":
        assert thumbnails == []
        return
    assert thumbnails == [0 if tiling.thumbnail == "first" else len(plan) - 1]
    box = plan[thumbnails[0]]
    assert (box.left, box.top, box.right, box.bottom) == (0, 0, width, height)


def test_counts_agree_with_the_tiles_that_are_cut():
    rng = random.Random(2)
    for _ in range(120):
        tiling = random_tiling(rng, side=24)
        width, height = rng.randint(1, 120), rng.randint(1, 120)
        tiles = cut_tiles(Image.new("RGB", (width, height)), tiling)
        assert tiles.shape == (
            count_tiles(width, height, tiling),
            3,
            tiling.tile_height,
            tiling.tile_width,
        ), (width, height, tiling)


def test_ovis_keeps_the_ratio_and_internvl_fills_the_tile():
    (ovis,) = plan_tiles(900, 300, Tiling(max_tiles=1))
    assert ovis == TileBox(
        left=0, top=0, right=900, bottom=300, resized_width=384, resized_height=128, offset_x=0, offset_y=128
    )
    (internvl,) = plan_tiles(900, 300, Tiling(rule="internvl", max_tiles=1))
    assert (internvl.resized_width, internvl.resized_height) == (384, 384)
    assert (internvl.offset_x, internvl.offset_y) == (0, 0)


def test_last_row_and_column_take_the_remainder():
    tiles = plan_tiles(1001, 1001, Tiling(thumbnail="none"))
    assert len(tiles) == 9
    assert (tiles[0].right, tiles[0].bottom) == (333, 333)
    assert (tiles[8].left, tiles[8].top, tiles[8].right, tiles[8].bottom) == (666, 666, 1001, 1001)


def test_rectangular_tiles_follow_their_own_ratio():
    wide = Tiling(tile_width=400, tile_height=100, thumbnail="none")
    assert choose_grid(400, 100, wide) == (1, 1)
    assert choose_grid(400, 300, wide) == (3, 1)
    assert choose_grid(800, 100, wide) == (1, 2)
    (box,) = plan_tiles(800, 200, dataclasses.replace(wide, max_tiles=1))
    assert (box.resized_width, box.resized_height, box.offset_x, box.offset_y) == (400, 100, 0, 0)
    assert choose_grid(400, 300, dataclasses.replace(wide, rule="internvl")) == (3, 1)
    assert choose_grid(1600, 200, dataclasses.replace(wide, rule="internvl")) == (2, 4)


@pytest.mark.parametrize("rule", ["ovis", "internvl"])
@pytest.mark.parametrize(("width", "height"), [(4000, 10), (10, 4000), (1, 20000), (20000, 1), (1, 1)])
def test_extreme_strips_are_clamped(rule, width, height):
    tiling = Tiling(rule=rule, tile_height=32, tile_width=32)
    for box in plan_tiles(width, height, tiling):
        assert min(box.resized_width, box.resized_height) >= 1
    assert cut_tiles(Image.new("RGB", (width, height)), tiling).shape[0] == count_tiles(width, height, tiling)


def test_boxes_map_into_tiles():
    first, second = plan_tiles(768, 192, Tiling(thumbnail="none"))
    assert first.to_tile((0, 0, 384, 192)) == (0, 96, 384, 288)
    assert second.to_tile((384, 96, 480, 192)) == (0, 192, 96, 288)


def test_threshold_is_strict():
    # Shrinking 400x400 into 380x380 keeps 0.9025 of its area.
    settings = {"tile_height": 380, "tile_width": 380, "thumbnail": "none"}
    assert choose_grid(400, 400, Tiling(**settings)) == (1, 1)
    assert choose_grid(400, 400, Tiling(**settings, covering_threshold=0.9025)) == (2, 2)


def test_settings_survive_a_round_trip():
    tiling = Tiling(rule="internvl", tile_height=448, tile_width=320, max_tiles=6, thumbnail="last")
    assert Tiling.from_dict(tiling.to_dict()) == tiling
    assert Tiling.from_dict({}) == Tiling()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "oviss"}, "tiling.rule is 'oviss'; did you mean 'ovis'"),
        ({"thumbnail": "fist"}, "tiling.thumbnail is 'fist'; did you mean 'first'"),
        ({"thumbnail": None}, "tiling.thumbnail is None"),
        ({"max_tiles": 0}, "tiling.max_tiles must be a whole number from 1 to 256, found 0"),
        ({"max_tiles": 10**9}, "tiling.max_tiles must be a whole number from 1 to 256, found 1000000000"),
        ({"max_tiles": 257}, "tiling.max_tiles must be a whole number from 1 to 256, found 257"),
        ({"max_side": 10**6}, "tiling.max_side must be a whole number from 1 to 256, found 1000000"),
        ({"tile_width": 8193}, "tiling.tile_width must be a whole number from 1 to 8192, found 8193"),
        ({"tile_height": 10**12}, "tiling.tile_height must be a whole number from 1 to 8192, found 1000000000000"),
        ({"tile_height": -384}, "tiling.tile_height must be .* found -384"),
        ({"tile_width": 384.0}, "tiling.tile_width must be a whole number .* found 384.0"),
        ({"max_tiles": True}, "tiling.max_tiles must be a whole number"),
        ({"max_side": 0}, "tiling.max_side must be a whole number from 1 to 256, found 0"),
        ({"covering_threshold": 1.5}, "tiling.covering_threshold must be a share between 0 and 1, found 1.5"),
        ({"covering_threshold": float("nan")}, "tiling.covering_threshold must be .* found nan"),
        ({"max_tile": 4}, "tiling has no setting 'max_tile'; did you mean 'max_tiles'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Tiling.from_dict(settings)


def test_the_largest_settings_choose_a_grid():
    for rule in RULES:
        assert count_tiles(65_535, 1, Tiling(rule=rule, max_tiles=MAX_TILES, tile_height=8192, tile_width=8192)) > 1


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (-1, 5)])
@pytest.mark.parametrize("function", [choose_grid, plan_tiles, count_tiles])
def test_images_without_pixels_are_refused(function, width, height):
    with pytest.raises(DataError, match=f"width {width} and height {height}"):
        function(width, height, Tiling())
