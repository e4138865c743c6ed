"""What P_vocab reads at each place: a plain softmax in float64, places in the image, blanks, and the painted page."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from alignvlm_pl.errors import ConfigError
from alignvlm_pl.models import token_readout
from alignvlm_pl.models.build import build_model, build_processor
from alignvlm_pl.models.collapse import Collapse
from alignvlm_pl.models.pixels import cut_tiles
from alignvlm_pl.models.tiny import tiny_spec
from alignvlm_pl.models.token_readout import PlacedToken, has_places, place_tokens, read_page, read_tokens
from alignvlm_pl.preprocessing.imaging import cut_pixels, join_tiles
from alignvlm_pl.preprocessing.tiling import Tiling, plan_tiles, token_boxes
from alignvlm_pl.scoring.readout_page import entropy_colour, paint_readout, visible


def build(folder, **connector):
    torch.manual_seed(0)
    spec = tiny_spec(folder)
    spec.connector.update(connector)
    processor = build_processor(spec)
    return build_model(spec, processor).eval(), processor


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tokenizer"), gain_init=6.0)


@pytest.fixture
def page():
    image = Image.new("RGB", (112, 56), "white")
    ImageDraw.Draw(image).text((4, 4), "Total 12", fill="black")
    return image


def test_values_are_those_of_a_plain_softmax_in_float64(built, page, monkeypatch):
    net, processor = built
    tiles, connector = cut_tiles(page, processor.geometry), net.connector
    monkeypatch.setattr(token_readout, "CHUNK_TOKENS", 7)
    found = read_tokens(net, tiles)
    with torch.no_grad():
        hidden = connector.norm1(connector.w1(net.encode_images(tiles))).double()
        scores = hidden @ connector.w2.weight.double().T
        scores = (scores - scores.mean(-1, keepdim=True)) / (scores.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        weights = (scores * connector.norm2.weight.double() + connector.norm2.bias.double()).softmax(dim=-1)
    entropy = -(weights * weights.log()).sum(dim=-1)
    assert found.ids.shape == (len(tiles), net.config.tokens_per_tile)
    assert torch.equal(found.ids, weights.argmax(dim=-1))
    torch.testing.assert_close(found.probabilities.double(), weights.amax(dim=-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    assert entropy.std() > 0.05, "a test of equal values proves nothing"
    assert found.kept is found.blank is None
    assert not found.entropy.requires_grad


def test_ids_are_token_ids_also_where_rows_are_left_out(tmp_path, page):
    kept = [10, 40, 41, 42, 65, 66, 67, 200]
    net, processor = build(tmp_path, vocab_keep=kept)
    found = read_tokens(net, cut_tiles(page, processor.geometry))
    assert set(found.ids.flatten().tolist()) <= set(kept)


def test_no_tiles_give_no_values(built):
    net, _ = built
    found = read_tokens(net, torch.zeros(0, 3, 56, 56))
    assert [tuple(value.shape) for value in found[:3]] == [(0, net.config.tokens_per_tile)] * 3


def test_what_is_kept_is_what_the_llm_runs_on(built, page, monkeypatch):
    net, processor = built
    rows = list(net.connector.row_ids())
    content = [{"type": "image", "image": page}, {"type": "text", "text": "?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    with torch.no_grad():
        mass = float(net.read(inputs["pixel_values"], rows[::2]).logsumexp(-1).exp().quantile(0.3))
        monkeypatch.setattr(net.connector, "collapse", Collapse(mass, tuple(rows[::2])))
        expected = net(**inputs).kept_tokens
    tokens = read_page(net, processor, page)
    assert [token.kept for token in tokens] == expected.flatten().tolist()
    assert 0 < sum(token.kept for token in tokens) < len(tokens)
    assert all(token.blank for token in tokens if not token.kept)


def test_a_connector_without_p_vocab_is_refused_by_name(tmp_path):
    spec = tiny_spec(tmp_path)
    spec.connector.clear()
    spec.connector["type"] = "mlp"
    net = build_model(spec, build_processor(spec))
    assert not has_places(net)
    with pytest.raises(ConfigError, match="connector 'mlp' has no P_vocab to read out; use 'align'"):
        read_tokens(net, torch.zeros(1, 3, 56, 56))


@pytest.mark.parametrize("rule", ["ovis", "internvl"])
def test_boxes_lie_where_the_tokens_pixels_come_from(rule):
    tiling = Tiling(rule=rule, tile_height=56, tile_width=56, max_tiles=4, thumbnail="first")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 151, 3), dtype=np.uint8))
    image = image.resize((15, 9)).resize((151, 90), Image.Resampling.NEAREST)  # blocks, which resampling keeps
    pixels, _ = cut_pixels(image, tiling)
    boxes = token_boxes(*image.size, tiling, grid=(4, 4), token_size=(14, 14))
    compared = 0
    for tile, plan, cells in zip(pixels, plan_tiles(*image.size, tiling), boxes, strict=True):
        for index, (x0, y0, x1, y1) in enumerate(cells):
            if plan.is_thumbnail or min(x1 - x0, y1 - y0) < 4 or not max(x1 - x0, y1 - y0) > 0:
                continue
            row, col = divmod(index, 4)
            seen = tile[:, 14 * row : 14 * row + 14, 14 * col : 14 * col + 14]
            if not seen.any(axis=0).all():  # partly padding
                continue
            expected = np.asarray(image.crop((round(x0), round(y0), round(x1), round(y1)))).mean(axis=(0, 1))
            assert np.abs(seen.mean(axis=(1, 2)) - expected).max() < 25
            compared += 1
    assert compared > 10


def test_tokens_in_padding_have_no_area():
    # 112 x 28 in one tile of 56 x 56: 14 px of image between two strips of 21 px.
    tiling = Tiling(tile_height=56, tile_width=56, max_tiles=1)
    boxes = token_boxes(112, 28, tiling, grid=(4, 4), token_size=(14, 14))[0]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    assert areas == [0] * 4 + [28 * 14] * 8 + [0] * 4
    assert boxes[5] == (28, 0, 56, 14)


@pytest.mark.parametrize("rule", ["ovis", "internvl"])
def test_a_page_is_joined_from_its_tiles(rule):
    tiling = Tiling(rule=rule, tile_height=56, tile_width=56, max_tiles=4, thumbnail="last")
    ramp = np.linspace(0, 255, 130)[None] * np.ones((90, 1))
    page = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    pixels, _ = cut_pixels(page, tiling)
    joined = join_tiles(pixels, page.size, tiling, longest=1000)
    assert joined.size == page.size
    assert np.abs(np.asarray(joined, float) - np.asarray(page, float)).max() < 8
    assert join_tiles(pixels, page.size, tiling, longest=65).size == (65, 45)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    exact = join_tiles(cut_pixels(noise, tiling)[0], noise.size, tiling, longest=1000)
    assert np.array_equal(exact, noise), "the thumbnail is not pasted over the page"


def test_blanks_are_whitespace_where_nothing_is_left_out(built, page):
    net, processor = built
    size, tiling = page.size, processor.geometry
    shape = (len(plan_tiles(*size, tiling)), net.config.tokens_per_tile)
    ids = torch.full(shape, processor.tokenizer("a")["input_ids"][0])
    ids[0, :2] = torch.tensor([processor.tokenizer(text)["input_ids"][0] for text in "\n "])
    values = torch.zeros(shape)
    readout = token_readout.TokenReadout(ids, values, values, None, None)
    tokens = place_tokens(readout, net.config, processor.tokenizer, size=size, tiling=tiling)
    assert [token.text for token in tokens[:3]] == ["\n", " ", "a"]
    assert [token.blank for token in tokens] == [True, True] + [False] * (len(tokens) - 2)
    assert all(token.kept for token in tokens)


def cells(**change):
    """Four tokens of a page of 40 x 20; the second is as `change` says."""
    plain = {"text": "a", "probability": 0.9, "entropy": 0.1, "kept": True, "blank": False, "in_thumbnail": False}
    return [PlacedToken((10 * n, 0, 10 * n + 10, 20), **(plain | (change if n == 1 else {}))) for n in range(4)]


def painted(tokens, page=None, **options):
    return np.asarray(paint_readout(page or Image.new("RGB", (40, 20), "grey"), tokens, most=5.0, **options)).astype(
        int
    )


def test_a_cell_shows_whether_it_is_kept_its_text_and_its_entropy():
    plain = painted(cells())
    height = 64  # cells of 32 x 64 px, above the legend
    assert plain.shape[1] >= 4 * 32 and height < plain.shape[0] < height + 120
    changes = {
        "dropped": {"kept": False, "blank": True},
        "blank": {"blank": True},
        "text": {"text": "W"},
        "entropy": {"entropy": 4.0},
    }
    found = {name: painted(cells(**change))[:height] for name, change in changes.items()}
    for name, image in found.items():
        differs = (image != plain[:height]).any(axis=(0, 2))
        assert differs[32:64].any(), name
        assert not differs[:32].any() and not differs[64:].any(), f"{name} changes its own cell alone"
    within = found["dropped"][2:62, 34:62]
    assert np.median(within) > 230, "a dropped token is white"
    assert np.median(found["blank"][2:62, 34:62]) < 230
    assert np.array_equal(found["blank"], painted(cells(blank=True, text="W"))[:height]), "a blank has no text"


def test_large_and_tiny_pages_have_a_limit_and_are_scaled_up():
    boxes = [(14 * x, 14 * y, 14 * x + 14, 14 * y + 14) for y in range(300) for x in range(3)]
    tokens = [PlacedToken(box, "", 1.0, 0.0, True, True, False) for box in boxes]
    tall = painted(tokens, Image.new("RGB", (42, 4200)))
    assert 2000 < tall.shape[0] < 2120
    half = painted(cells(), Image.new("RGB", (20, 10), "grey"), size=(40, 20))
    assert half.shape == painted(cells()).shape, "boxes are those of the image that the page is a smaller version of"
    empty = [PlacedToken((0, 0, 0, 0), "a", 1.0, 0.0, True, False, False)]
    assert painted(empty).shape[0] > 20, "padding alone"


def test_a_thumbnail_is_painted_below():
    thumbnail = [token._replace(in_thumbnail=True) for token in cells()]
    assert painted([*thumbnail, *cells()]).shape[0] == painted(cells()).shape[0] + 64


def test_text_and_colour():
    assert visible(" a\n\t\x00é日") == "·a\\n\\t\\x00é日"
    ends = [entropy_colour(value, 5.0) for value in (-1.0, 0.0, 5.0, 9.0)]
    assert ends[0] == ends[1] != ends[2] == ends[3]
    assert entropy_colour(5.0 * 0.25, 5.0) == (255, 215, 80), "the middle colour is at a quarter of the scale"
    assert math.isfinite(sum(entropy_colour(0.1, 5.0)))
    assert entropy_colour(math.nan, 5.0) == ends[-1], "weights that are not finite end the run with an error of its own"
