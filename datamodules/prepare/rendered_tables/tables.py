"""Tables as page images: HTML -> PDF (weasyprint) -> pixels (pdfium).

Wide tables get a wider page; long ones several pages, each with the header row again. A cell that is missing in the
PDF's text layer is an error, so no text of a table is lost.
"""

import html
import io
import logging
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageFile

from alignvlm_pl.errors import ConfigError

from ...shards.sample import SampleError

PAGE_WIDTH_PX, PAGE_HEIGHT_PX, MARGIN_PX = 1000, 1400, 16
_POINTS_PER_PX = 72 / 96
_WIDENINGS = 4
_BORDER_PX = 2
_STYLE = """
@font-face {{ font-family: Table; src: url({font}); }}
@font-face {{ font-family: Table; font-weight: bold; src: url({bold}); }}
@page {{ size: {width}px {height}px; margin: {margin}px; }}
body {{ font: 14px Table, sans-serif; margin: 0; color: #202122; }}
table {{ border-collapse: collapse; }}
caption {{ font-weight: bold; text-align: left; padding: 0 0 6px; }}
th, td {{ border: 1px solid #a2a9b1; padding: 3px 6px; }}
th {{ background: #eaecf0; font-weight: bold; text-align: center; }}
tr {{ break-inside: avoid; }}
a {{ color: #0645ad; text-decoration: none; }}
th, td {{ bookmark-level: 1 !important; bookmark-label: attr(rowspan) "|" attr(colspan) "|" content(text) !important; }}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table: its name in the dataset, cells of each row (the header first), title, and published HTML, if any."""

    name: str
    rows: Sequence[Sequence[str]]
    caption: str = ""
    markup: str = ""

    def to_html(self) -> str:
        """Return the table as HTML; cells of `rows` are escaped."""
        if self.markup:
            return self.markup
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        head, *body = [[html.escape(cell).replace("\n", "<br>") for cell in row] for row in self.rows] or [[]]
        header = "".join(f"<th>{cell}</th>" for cell in head)
        lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
        return f"<table>{caption}<thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>"


class RenderedCell(NamedTuple):
    """A cell on a page: its visible text, and the rows and columns it spans."""

    text: str
    rows: int = 1
    columns: int = 1

    @classmethod
    def from_bookmark(cls, label: str) -> "RenderedCell":
        """Read the bookmark of a cell (see `_STYLE`)."""
        *spans, text = label.split("|", 2)
        numbers = [int(span) if re.fullmatch(r"\s*[0-9]{1,5}\s*", span) else 1 for span in spans]
        return cls(text, *(max(number, 1) for number in numbers))


def render_table(table: Table) -> list[Image.Image]:
    """Render a table to page images of at most `PAGE_HEIGHT_PX`, cropped to their content.

    Raises:
        SampleError: It is empty, too large to lay out, or text of its cells is not on the pages.
        ConfigError: The renderer is not installed.
    """
    if not table.rows or not any(cell.strip() for row in table.rows for cell in row):
        raise SampleError(f"table {table.name} is empty", "empty_table")
    check_size(table)
    try:
        layout, rendered = _pdf(table)
    except RecursionError as error:
        raise SampleError(f"table {table.name} is too large to lay out: nested too deep", "too_large") from error
    with layout as document:
        text = "".join(page.get_textpage().get_text_range() for page in document)
        missing = missing_cells(table, rendered, text)
        if missing:
            raise SampleError(
                f"table {table.name}: {len(missing)} cells are not on its pages, the first is {missing[0]!r:.80}",
                "lost_text",
            )
        return [_cropped(page.render(scale=1 / _POINTS_PER_PX).to_pil().convert("RGB")) for page in document]


_MAX_CELLS = 50_000
_MAX_DEPTH = 200
_MAX_SPANS = {"colspan": 1000, "span": 1000, "rowspan": 65_534}
"""Limits of the HTML standard, beyond which a layout takes minutes or all memory."""
_SPANNED = {"td": ("colspan", "rowspan"), "th": ("colspan", "rowspan"), "col": ("span",), "colgroup": ("span",)}
# Elements that the next one of their kind closes, or that hold nothing.
_NOT_NESTED = {*("td", "th", "tr", "tbody", "thead", "tfoot", "caption", "col", "colgroup", "p", "li", "dt", "dd")}
_NOT_NESTED |= {"br", "hr", "img", "input", "link", "meta", "wbr", "area", "base", "embed", "source", "track"}


def check_size(table: Table) -> None:
    """Raise SampleError where a table exceeds a limit of cells, spans or depth."""
    try:
        if (cells := sum(map(len, table.rows))) > _MAX_CELLS:
            raise ValueError(f"{cells} cells, expected at most {_MAX_CELLS}")
        _Extent().feed(table.markup)
    except ValueError as error:
        raise SampleError(f"table {table.name} is too large to lay out: {error}", "too_large") from error


class _Extent(HTMLParser):
    """Counts the cells, spans and open elements of markup; raises ValueError beyond the limits."""

    _cells = _depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag not in _NOT_NESTED
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} elements deep")
        for name in _SPANNED.get(tag, ()):
            found = re.match(r"\s*\+?0*([0-9]+)", dict(attrs).get(name) or "")
            span = int(found[1][:20]) if found else 1
            if span > _MAX_SPANS[name]:
                raise ValueError(f"a {name} of {span}, expected at most {_MAX_SPANS[name]}")
            self._cells += span * (name != "rowspan")
        if self._cells > _MAX_CELLS:
            raise ValueError(f"more than {_MAX_CELLS} cells")

    def handle_endtag(self, tag: str) -> None:
        self._depth = max(self._depth - (tag not in _NOT_NESTED), 0)


def missing_cells(table: Table, rendered: Sequence[RenderedCell], layer: str) -> list[str]:
    """Return the cells of a table that are not on its pages; white space, case and invisible marks do not count.

    Each cell of the table needs its own rendered cell, so one lost of two equal cells is noticed, and a `12` beside a
    `123`. A rendered cell that spans rows or columns stands for as many, inside the table. In published markup it may
    hold more than the cell, such as notes.

    Args:
        table: The table.
        rendered: The cells that the renderer has put on pages.
        layer: The text layer of the pages; where the rendered cells hold more characters than it, all are missing.
    """
    height, width = len(table.rows), max(map(len, table.rows), default=1)
    held: Counter[str] = Counter()
    for cell in rendered:
        held[_plain(cell.text)] += min(cell.rows, height) * min(cell.columns, width)
    needed = Counter(plain for row in table.rows for text in row if (plain := _plain(text)))
    lost = sorted((needed - held).elements(), key=len, reverse=True)
    if table.markup:
        lost = _without_notes(lost, held - needed)
        lost = _without_joined(lost, table.rows[0], held)
    cells = {_plain(text): text for row in table.rows for text in row}
    characters = sum((_characters(_plain(cell.text)) for cell in rendered), Counter[str]())
    unseen = characters - _characters(_plain(layer))
    return [cells[plain] for plain in lost] or ["".join(unseen)] * bool(unseen)


def _without_notes(lost: Sequence[str], spare: Counter[str]) -> list[str]:
    """Remove the cells whose text is part of a spare rendered cell, beside notes or names of images.

    The longest come first, because few rendered cells can hold them.
    """
    for holds in (str.__contains__, _holds):  # contiguous text first
        left = []
        for cell in lost:
            found = (text for text, count in spare.items() if count > 0 and holds(text, cell))
            holder = min(found, key=len, default=None)
            if holder is None:
                left.append(cell)
            else:
                spare[holder] -= 1
        lost = left
    return list(lost)


def _holds(text: str, cell: str) -> bool:
    """Whether all characters of a cell are in a text, in their order."""
    letters = iter(text)
    return all(letter in letters for letter in cell)


def _without_joined(lost: Sequence[str], header: Sequence[str], held: Counter[str]) -> list[str]:
    """Remove the cells that the release has joined from several header rows."""
    joined = {
        _plain(cell)
        for cell in header
        if "\n" in cell and all(any(_plain(line) in text for text in held) for line in cell.split("\n"))
    }
    return [cell for cell in lost if cell not in joined]


def _characters(plain: str) -> Counter[str]:
    # Dashes at the end of a line are not in a PDF's text as they are in the cell.
    return Counter(letter for letter in plain if unicodedata.category(letter) != "Pd")


def _plain(text: str) -> str:
    folded = re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter) not in ("Cf", "Cc"))


def _pdf(table: Table) -> tuple[Any, list[RenderedCell]]:
    """Lay out a table on pages that are wide enough; return the document and its rendered cells."""
    weasyprint, pdfium = renderers()
    width = PAGE_WIDTH_PX
    for _ in range(_WIDENINGS):
        data, rendered = _layout(weasyprint, table, width)
        document = pdfium.PdfDocument(data)
        right = max(_right_edges(document), default=0) / _POINTS_PER_PX
        if right <= width - MARGIN_PX + _BORDER_PX:
            return document, rendered
        width = math.ceil(right) + MARGIN_PX
    raise SampleError(
        f"table {table.name} does not fit a page of any tried width (last {width} px): its markup sets "
        "widths; render it from its cells",
        "too_wide",
    )


def _layout(weasyprint: Any, table: Table, width: int) -> tuple[bytes, list[RenderedCell]]:
    font, bold = _font_files()
    style = _STYLE.format(font=font, bold=bold, width=width, height=PAGE_HEIGHT_PX, margin=MARGIN_PX)

    class OnlyFonts(weasyprint.urls.URLFetcher):
        """Fetches the fonts only, none of the images and style sheets that a published table refers to."""

        def fetch(self, url: str, headers: Any = None) -> Any:
            if url not in (font, bold):
                raise ValueError("not fetched")
            return super().fetch(url, headers)

    page = f'<!doctype html><html><head><meta charset="utf-8"><style>{style}</style></head><body>{table.to_html()}'
    document = weasyprint.HTML(string=page, url_fetcher=OnlyFonts()).render()
    # Each cell that gets a box is a bookmark, those of a repeated header row once.
    rendered = [RenderedCell.from_bookmark(label) for label, *_ in document.make_bookmark_tree()]
    return document.write_pdf(), rendered


def _right_edges(document: Any) -> Iterator[float]:
    for page in document:
        for item in page.get_objects(max_depth=4):
            bounds = item.get_bounds() if hasattr(item, "get_bounds") else item.get_pos()
            yield bounds[2]


def _cropped(page: Image.Image) -> Image.Image:
    """Cut a page to its content and a margin."""
    box = ImageChops.difference(page, Image.new("RGB", page.size, "white")).getbbox()
    if box is None:
        return page
    left, top, right, bottom = box
    inside = (max(left - MARGIN_PX, 0), max(top - MARGIN_PX, 0))
    return page.crop((*inside, min(right + MARGIN_PX, page.width), min(bottom + MARGIN_PX, page.height)))


def to_png(page: Image.Image) -> bytes:
    """Return a page as the bytes of a PNG."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def renderers() -> tuple[Any, Any]:
    """Import weasyprint and pypdfium2; raises ConfigError where one, or a library it needs, is missing."""
    # weasyprint's import makes Pillow accept truncated images in the whole process, which would hide damaged pages.
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            # It warns that HarfBuzz-Subset will be required.
            warnings.simplefilter("ignore", DeprecationWarning)
            import pypdfium2
            import weasyprint
    except ImportError as error:
        raise ConfigError(
            f"rendering tables needs weasyprint and pypdfium2 ({error}): pip install 'alignvlm_pl[tables]'"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"rendering tables needs the library pango ({str(error).splitlines()[0]}); on Debian or Ubuntu: "
            "apt-get install libpangoft2-1.0-0 libharfbuzz-subset0"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    logging.getLogger("weasyprint").setLevel(logging.CRITICAL)
    return weasyprint, pypdfium2


@lru_cache(maxsize=1)
def _font_files() -> tuple[str, str]:
    """Return URLs of the typeface and its bold, the same on every machine; other fonts fill in missing letters."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        return "file:///none", "file:///none"
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return (folder / "DejaVuSans.ttf").as_uri(), (folder / "DejaVuSans-Bold.ttf").as_uri()
