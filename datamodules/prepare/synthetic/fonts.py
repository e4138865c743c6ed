"""Typefaces from installed packages, by split, with opened fonts kept.

Caladea and Hanken Grotesk are never used for training: the held-out font sets are set in them.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

from alignvlm_pl.errors import ConfigError, nearest

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
FONT_SETS = tuple(_FAMILIES)
# Hair lines vanish at 20 px; a variable font opens at its thinnest instance.
_SKIPPED = ("Thin", "ExtraLight", "Variable")


@dataclass(frozen=True, kw_only=True, slots=True)
class Face:
    """One font file.

    Attributes:
        path: The file.
        bold_path: A heavier cut of the same family for headings; the file itself where there is none.
        family: Name of the family.
        weight: Relative frequency of the face in documents.
    """

    path: Path
    bold_path: Path
    family: str
    weight: float


@cache
def load_faces(font_set: str) -> tuple[Face, ...]:
    """Return the faces of a font set, ``train`` or ``heldout``.

    Raises:
        ConfigError: Unknown set, or a font package that is not installed.
    """
    if font_set not in _FAMILIES:
        raise ConfigError(f"fonts of a synthetic set: unknown {font_set!r}; {nearest(font_set, _FAMILIES)}")
    faces: list[Face] = []
    for family, (package, pattern, weight) in _FAMILIES[font_set].items():
        files = [
            path
            for path in package_files(package, pattern)
            if not any(part in path.stem for part in _SKIPPED)
        ]
        faces += [
            Face(path=path, bold_path=_bold(path, files), family=family, weight=weight / len(files))
            for path in files
        ]
    return tuple(faces)


def _bold(path: Path, files: list[Path]) -> Path:
    """Find the upright bold cut that lies beside a file."""
    return next((other for other in files if other.stem.endswith("-Bold")), path)


@lru_cache(maxsize=1024)
def open_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size in px; kept, because opening costs more than drawing a line."""
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
