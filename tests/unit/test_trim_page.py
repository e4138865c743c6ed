"""Pages are cut to their content, whatever surrounds it, and brought to a width."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from alignvlm_pl.preprocessing.images.trim import LARGEST_SCALE, scale_to_width, trim_page

SIZE = (800, 1100)
PLACE = (250, 300)
FONT = ImageFont.load_default(20)
TEXT = "TOTAL 12.50\nCASH 20.00\nCHANGE 7.50"


def page(paper: object = 250, ink: object = 30, mode: str = "L") -> tuple[Image.Image, tuple[float, ...]]:
    """Return a page with three lines of text in its midst, and the text's box."""
    image = Image.new(mode, SIZE, paper)
    draw = ImageDraw.Draw(image)
    draw.text(PLACE, TEXT, fill=ink, font=FONT)
    return image, draw.textbbox(PLACE, TEXT, font=FONT)


def require_tight(image: Image.Image, text: tuple[float, ...], *, slack: float = 30) -> None:
    cut, box = trim_page(image)
    assert cut.size == (box[2] - box[0], box[3] - box[1])
    assert cut.tobytes() == image.crop(box).tobytes()
    left, top, right, bottom = text
    assert left - slack <= box[0] <= left
    assert top - slack <= box[1] <= top
    assert right <= box[2] <= right + slack
    assert bottom <= box[3] <= bottom + slack


def _specks(image: Image.Image) -> None:
    dirt = np.random.default_rng(0)
    for x, y in dirt.integers((20, 20), (780, 1080), (40, 2)).tolist():
        ImageDraw.Draw(image).ellipse((x, y, x + 4, y + 4), fill=0)


def _scanner_edge(image: Image.Image) -> None:
    shade = np.minimum(np.asarray(image), 20 + 8.0 * np.arange(800))
    image.paste(Image.fromarray(shade.astype(np.uint8)))


def _black_border(image: Image.Image) -> None:
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 799, 60), fill=5)
    draw.polygon([(799, 0), (799, 1099), (690, 1099), (740, 0)], fill=12)
    draw.polygon([(0, 900), (0, 1099), (300, 1099)], fill=8)


def _frame(image: Image.Image) -> None:
    ImageDraw.Draw(image).polygon([(20, 25), (780, 18), (785, 1080), (24, 1070)], outline=40, width=3)


def _fold(image: Image.Image) -> None:
    shade = np.asarray(image).astype(float)
    shade *= 1 - 0.25 * np.exp(-(((np.arange(1100) - 800) / 25) ** 2))[:, None]
    shade *= np.linspace(0.8, 1, 800)
    image.paste(Image.fromarray(shade.astype(np.uint8)))


def _noise(image: Image.Image) -> None:
    grain = np.random.default_rng(1).normal(0, 8, SIZE[::-1])
    image.paste(Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)))


SURROUNDINGS = (_specks, _scanner_edge, _black_border, _frame, _fold, _noise)


@pytest.mark.parametrize("surround", SURROUNDINGS)
@pytest.mark.parametrize(("paper", "ink"), [(250, 30), (170, 60)])
def test_what_surrounds_the_content_is_cut_off(surround, paper, ink):
    image, text = page(paper, ink)
    surround(image)
    require_tight(image, text)


@pytest.mark.parametrize(
    ("paper", "ink", "mode"),
    [(255, 0, "L"), (250, 225, "L"), ((250, 190, 200), (40, 40, 160), "RGB"), ((60, 60, 70), (240, 240, 240), "RGB")],
)
def test_paper_and_ink_of_any_colour(paper, ink, mode):
    require_tight(*page(paper, ink, mode))


def test_all_ink_of_a_page_stays_inside():
    random = np.random.default_rng(2)
    for _ in range(12):
        image = Image.new("L", (int(random.integers(200, 1000)), int(random.integers(200, 1200))), 235)
        draw, inked = ImageDraw.Draw(image), Image.new("L", image.size, 0)
        for _ in range(random.integers(1, 6)):
            word = "".join(random.choice(list("abcdeXYZ0189"), random.integers(3, 12)))
            font = ImageFont.load_default(int(random.integers(13, 60)))
            place = (int(random.integers(0, image.width - 20)), int(random.integers(0, image.height - 20)))
            draw.text(place, word, fill=int(random.integers(0, 150)), font=font)
            ImageDraw.Draw(inked).text(place, word, fill=255, font=font)
        noise = random.normal(0, random.uniform(0, 6), (image.height, image.width))
        noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        _, box = trim_page(noisy)
        edge = (8, 8, image.width - 8, image.height - 8)  # a mark on the very border is none
        left, top, right, bottom = inked.point(lambda value: 255 * (value > 127)).crop(edge).getbbox() or (0, 0, 0, 0)
        assert box[0] <= left + 8
        assert box[1] <= top + 8
        assert box[2] >= right + 8
        assert box[3] >= bottom + 8


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 480)])
@pytest.mark.parametrize("mark", [None, *SURROUNDINGS[:1]])
def test_a_page_without_content_is_returned_as_it_is(size, mark):
    image = Image.new("RGB", size, (200, 210, 190))
    if mark and min(size) > 400:
        ImageDraw.Draw(image).ellipse((200, 200, 204, 204), fill="black")
    assert trim_page(image) == (image, (0, 0, *size))


def test_a_page_full_of_content_stays_whole():
    squares = np.random.default_rng(3).integers(0, 255, (400, 300, 3), np.uint8)
    image = Image.fromarray(squares.repeat(4, 0).repeat(4, 1))
    assert trim_page(image)[1] == (0, 0, *image.size)


def test_large_scans_are_cut_as_small_ones():
    image, text = page()
    large = image.resize((2400, 3300), Image.Resampling.BICUBIC)
    require_tight(large, tuple(3 * edge for edge in text), slack=90)


def test_scaled_to_a_width():
    assert scale_to_width(Image.new("L", (330, 700)), 768).size == (768, 1629)
    assert scale_to_width(Image.new("L", (990, 1400)), 768).size == (768, 1086)
    assert scale_to_width(Image.new("L", (40, 30)), 768).size == (40 * LARGEST_SCALE, 30 * LARGEST_SCALE)
    assert max(scale_to_width(Image.new("L", (100, 20_000)), 768).size) <= 65_535
    image = Image.new("L", (768, 100))
    assert scale_to_width(image, 768) is image
