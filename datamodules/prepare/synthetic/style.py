"""The look of one document: typeface, size, and how wide its text is set.

CONTRACT: the encoder of the default model sees tokens of 32 px height and 8 px width, and the read warm start writes
each character of a row into a column of its own (alignvlm_pl/models/page_readout.py); equal neighbours are separated
best by a column between them. So no text is narrower than `Style.text_width`, and rows are `ROW_HEIGHT_PX` high.
"""

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random

from PIL import ImageFont

from alignvlm_pl.errors import require_known

from .resources import package_files

# Family name -> (package, file pattern, weight of the family). DejaVu comes with matplotlib.
_DEJAVU = "mpl-data/fonts/ttf"
_FAMILIES = {
    "train": {
        "dejavu-sans": ("matplotlib", f"{_DEJAVU}/DejaVuSans[.-]*.ttf", 14),
        "dejavu-mono": ("matplotlib", f"{_DEJAVU}/DejaVuSansMono*.ttf", 22),
        "dejavu-serif": ("matplotlib", f"{_DEJAVU}/DejaVuSerif[.-]*.ttf", 8),
        "roboto": ("font_roboto", "files/*.ttf", 14),
        "lato": ("font_lato", "files/*.ttf", 11),
        "manrope": ("font_manrope", "files/Manrope-*.ttf", 8),
        "source-sans": ("font_source_sans_pro", "files/*.otf", 13),
        "source-serif": ("font_source_serif_pro", "files/*.otf", 10),
    },
    "heldout": {
        "caladea": ("font_caladea", "files/*.ttf", 1),
        "hanken-grotesk": ("font_hanken_grotesk", "files/*.otf", 1),
    },
}
# Hair lines vanish at 20 px; a variable font opens at its thinnest instance.
_SKIPPED = ("Thin", "ExtraLight", "Variable")
_SQUEEZE = (0.68, 1.15)
# Pitch of ordinary text in px: least, most, most frequent. Receipts are set about half as wide as high.
_PITCH_PX = (9.4, 14.0, 10.8)
_PAGE_PITCH_PX = (9.4, 16.0, 11.5)
_LARGEST_PX = 35
_ITALIC = re.compile("(Italic|Oblique|It)$")
_PAGE_CASES = {"upper": 62, "title": 28, "mixed": 10}
_SAMPLE = "Quick brown fox 0123.45 jumps over lazy dogs"
_CASES = {"upper": 42, "title": 26, "lower": 12, "sentence": 8, "mixed": 12}
ROW_HEIGHT_PX = 32
"""Height of one row of visual tokens."""
COLUMN_WIDTH_PX = 8
"""Width of one visual token."""
MIN_PITCH_PX = 9.0
"""Least average width of a character."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """One font file, a heavier cut of its family for headings or itself, and how often it is in documents."""

    path: Path
    bold_path: Path
    family: str
    weight: float


@cache
def load_faces(font_set: str) -> tuple[Face, ...]:
    """Return the faces of ``train`` or ``heldout``; raises ConfigError for others, and where a package is missing."""
    require_known(font_set, _FAMILIES, f"fonts of a synthetic dataset: unknown {font_set!r}")
    faces: list[Face] = []
    for family, (package, pattern, weight) in _FAMILIES[font_set].items():
        files = [path for path in package_files(package, pattern) if not any(part in path.stem for part in _SKIPPED)]
        bold = next((path for path in files if path.stem.endswith("-Bold")), None)
        faces += [Face(path=path, bold_path=bold or path, family=family, weight=weight / len(files)) for path in files]
    return tuple(faces)


@lru_cache(maxsize=1024)
def _open_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size in px; kept, because opening costs more than drawing a line."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """Choices that hold for one document; `ink` and `paper` are grey levels of text and page, 0 is black."""

    face: Face
    size_px: int
    squeeze: float  # horizontal scale of the glyphs; below 1 imitates the condensed fonts of receipts
    spacing_px: float  # extra space between characters
    case: str  # one of `_CASES`; ``mixed`` changes by part of the page
    ink: int
    paper: int
    margin_px: int  # least distance of text from the left and right edges

    def scaled(self, scale: float) -> "Style":
        """Return the same style in another size, as long as that stays within a row."""
        return self if scale == 1.0 else replace(self, size_px=min(round(self.size_px * scale), _LARGEST_PX))

    def font(self, *, bold: bool = False) -> ImageFont.FreeTypeFont:
        """Return the opened font."""
        return _open_font(self.face.bold_path if bold else self.face.path, self.size_px)

    def text_width(self, text: str, *, bold: bool = False) -> float:
        """Return the width in px that `text` takes: its natural width, or what columns need if that is more."""
        natural = self.font(bold=bold).getlength(text) * self.squeeze + self.spacing_px * (len(text) - 1)
        doubled = sum(first == second for first, second in pairwise(text))
        return max(natural, MIN_PITCH_PX * len(text), COLUMN_WIDTH_PX * (len(text) + doubled + 1))


def draw_style(rng: Random, *, fonts: str) -> Style:
    """Choose the look of a document, with a typeface of the ``train`` or ``heldout`` fonts."""
    faces = load_faces(fonts)
    face = rng.choices(faces, [face.weight for face in faces])[0]
    case = rng.choices(list(_CASES), list(_CASES.values()))[0]
    ink, paper = rng.choices((rng.randint(0, 45), rng.randint(45, 105)), (70, 30))[0], rng.randint(205, 255)
    if rng.random() < 0.07:
        ink, paper = rng.randint(205, 255), rng.randint(0, 70)
    # Capitals have no tails, so upper-case text may stand higher in its row.
    size_px = rng.randint(20, 28 if case == "upper" else 25)
    return Style(
        face=face,
        size_px=size_px,
        squeeze=_squeeze(face, size_px, case, rng.triangular(*_PITCH_PX)),
        spacing_px=rng.choice((0.0, 0.0, rng.uniform(0, 1.5))),
        case=case,
        ink=ink,
        paper=paper,
        margin_px=rng.randint(3, 12),
    )


def draw_page_style(rng: Random, *, fonts: str) -> Style:
    """Choose the look of a whole page: as `draw_style`, but mostly in capitals, larger and with wider margins."""
    case = rng.choices(list(_PAGE_CASES), list(_PAGE_CASES.values()))[0]
    size_px = rng.randint(20, 30 if case == "upper" else 26)
    style = draw_style(rng, fonts=fonts)
    while rng.random() < _unlikely(style.face):
        style = draw_style(rng, fonts=fonts)
    style = replace(style, case=case, size_px=size_px, margin_px=round(rng.triangular(14, 84, 24)))
    if style.ink > style.paper and rng.random() < 0.9:  # few pages are white on black
        style = replace(style, ink=255 - style.ink, paper=255 - style.paper)
    return replace(style, squeeze=_squeeze(style.face, size_px, case, rng.triangular(*_PAGE_PITCH_PX)))


def _unlikely(face: Face) -> float:
    """Return how often (0-1) a face is not taken: receipts have no italics, and many have one pitch for all letters."""
    if _ITALIC.search(face.path.stem):
        return 0.85
    return 0.0 if "mono" in face.family else 0.4


def _squeeze(face: Face, size_px: int, case: str, pitch_px: float) -> float:
    """Return the scale that brings ordinary text near a pitch, within what still looks like type."""
    sample = _SAMPLE.upper() if case == "upper" else _SAMPLE
    natural_px = _open_font(face.path, size_px).getlength(sample) / len(sample)
    return min(_SQUEEZE[1], max(_SQUEEZE[0], pitch_px / natural_px))
