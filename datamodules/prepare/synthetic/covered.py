"""Pages of the VCR task (visual caption restoration, arXiv 2406.06462), in our own drawing: a picture, and below it a
caption of which a word is covered but for its upper and lower pixel rows.

Pictures are crops of the photo that comes with matplotlib, or drawn scenes; neither says what the covered word is.
"""

from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageOps

from . import makers
from .lexicon import alphanumerics
from .resources import package_files
from .sheet import Segment, Sheet
from .style import ROW_HEIGHT_PX
from .words import QUESTIONS

VISIBLE = {"easy": 0.3, "hard": 0.15}
"""Share of a word's height that stays visible at its upper and at its lower edge."""
_FEWEST_LETTERS = 4
_PHOTO_SHARE = 0.5
_GAP_PX = 10.0


def vcr_easy(sheet: Sheet) -> None:
    """A picture and a caption with a covered word, of which the outlines can be guessed."""
    _covered(sheet, VISIBLE["easy"])


def vcr_hard(sheet: Sheet) -> None:
    """A picture and a caption with a covered word, of which a few rows of pixels show."""
    _covered(sheet, VISIBLE["hard"])


def _covered(sheet: Sheet, visible: float) -> None:
    word = _write_caption(sheet)
    sheet.covers = {sheet.segments.index(word): visible}
    sheet.picture = _draw_picture(sheet.rng, sheet.width, (sheet.num_rows - 1) * ROW_HEIGHT_PX)
    sheet.ask(QUESTIONS["covered"], answer=word.text)


def _write_caption(sheet: Sheet) -> Segment:
    """Fill the last row with words, each a segment of its own; return the one that is to be covered."""
    left, row, words = sheet.left, sheet.num_rows - 1, list[Segment]()
    while True:
        text = sheet.cased(makers.draw(sheet.rng, sheet.split, makers.word))
        if left + sheet.width_of(text) > sheet.right:
            break
        words.append(sheet.put(text, row, left=left))
        left += words[-1].width + _GAP_PX
    if long := [word for word in words if len(alphanumerics(word.text)) >= _FEWEST_LETTERS]:
        return sheet.rng.choice(long)
    sheet.segments.clear()  # of short words alone, or one that was too wide
    return sheet.put(sheet.short_word(8), row)


def _draw_picture(rng: Random, width: int, height: int) -> Image.Image:
    """Return a grey-level picture of this size: a crop of the photo, or a scene of simple shapes."""
    if rng.random() < _PHOTO_SHARE:
        photo = _photo()
        wide = rng.randint(min(photo.width, width), photo.width)
        tall = min(photo.height, round(wide * height / width))
        left, top = rng.randint(0, photo.width - wide), rng.randint(0, photo.height - tall)
        crop = photo.crop((left, top, left + wide, top + tall)).resize((width, height), Image.Resampling.BICUBIC)
        return ImageOps.mirror(crop) if rng.random() < 0.5 else crop
    picture = Image.linear_gradient("L").resize((width, height))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(3, 9)):
        x0, y0 = rng.randint(-20, width), rng.randint(-20, height)
        box = (x0, y0, x0 + rng.randint(8, width // 2), y0 + rng.randint(8, height))
        draw = rng.choice((pen.ellipse, pen.rectangle))
        draw(box, fill=rng.randint(0, 255), outline=rng.choice((None, rng.randint(0, 255))))
    return picture


@cache
def _photo() -> Image.Image:
    (path,) = package_files("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")
    with Image.open(path) as image:
        return image.convert("L")
