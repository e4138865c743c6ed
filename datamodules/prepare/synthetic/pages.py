"""Whole pages, as wide as a scan and as high as their content: the cursor that writes them, form pages and table pages.

Receipts are in receipt_page.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from . import makers
from .lexicon import alphanumerics, belongs, load_lexicon
from .sheet import Segment, Shape, Sheet
from .style import MIN_PITCH_PX, ROW_HEIGHT_PX
from .words import MONTHS, QUESTIONS, USUAL

GAP_PX = 18
"""Least distance of two texts of one row."""
_TRIES = 30


@dataclass(kw_only=True, slots=True)
class Cursor:
    """Writes a sheet from top to bottom; `row` is the next free one."""

    sheet: Sheet
    row: int = 0
    labels: set[str] = field(default_factory=set)

    def chance(self, share: float) -> bool:
        """Return True for this share (0-1) of calls."""
        return self.sheet.rng.random() < share

    def cased(self, text: str) -> str:
        """Set a text in capitals where the document is, and now and then where its case is mixed."""
        case = self.sheet.style.case
        return text.upper() if case == "upper" or (case == "mixed" and self.chance(0.4)) else text

    def allowed(self, text: str) -> bool:
        """Say whether a value or name may stand here: as everywhere, but beside the usual words."""
        return belongs(text, self.sheet.split, usual=USUAL)

    def until(self, make: Callable[[], str], good: Callable[[str], bool] | None = None) -> str:
        """Call `make` until its text is good, which is `allowed` by default."""
        good = good or self.allowed
        for _ in range(5000):
            if good(text := make()):
                return text
        raise AssertionError(f"no text of the {self.sheet.split} split like {text!r}")

    def code(self, *shapes: str) -> str:
        """Fill one of the shapes: digits for 9, capitals for A."""
        rng = self.sheet.rng

        def make() -> str:
            shape = rng.choice(shapes)
            blanks = {"9": "0123456789", "A": ascii_uppercase}
            return "".join(rng.choice(blanks[sign]) if sign in blanks else sign for sign in shape)

        return self.until(make)

    def words(self, count: int, *, origin: str | None = None, max_letters: int = 10) -> str:
        """Return words of the lexicon in title case."""
        lexicon = load_lexicon(self.sheet.split)
        return " ".join(
            lexicon.word(self.sheet.rng, origin=origin, max_letters=max_letters).title() for _ in range(count)
        )

    def date(self) -> str:
        """Return a date; all of its letters and digits together decide its split, as days and months alone are few."""
        rng = self.sheet.rng

        def make() -> str:
            day, month, year = rng.randint(1, 28), rng.randint(1, 12), str(rng.randint(2006, 2027))
            mark, long = rng.choice("//-."), MONTHS[month - 1]
            name = rng.choice((long[:3], long[:3], long))
            short, full = (mark.join((f"{day:02d}", f"{month:02d}", number)) for number in (year[2:], year))
            shapes = (
                full, full, full, short, short, f"{day}{mark}{month}{mark}{year}",
                f"{year}{mark}{month:02d}{mark}{day:02d}", f"{day:02d} {name} {year}", f"{name} {day}, {year}",
                f"{day:02d}-{name[:3]}-{year}", f"{day:02d}/{name[:3]}/{year}",
            )  # fmt: skip
            return self.cased(rng.choice(shapes))

        return self.until(make, lambda text: self.allowed(text.replace(" ", "")))

    def time(self) -> str:
        """Return a time of day."""
        shape = self.sheet.rng.choice(("{0:02d}:{1:02d}", "{0:02d}:{1:02d}:{2:02d}", "{3}:{1:02d}:{2:02d} PM"))
        rng = self.sheet.rng
        return self.until(
            lambda: shape.format(rng.randint(8, 22), rng.randrange(60), rng.randrange(60), rng.randint(1, 11))
        )

    def label(self, options: Sequence[str], max_px: float = 1e9, *, bold: bool = False) -> str:
        """Choose a usual label that fits and is new on the page; the shortest one if there is none."""
        for _ in range(_TRIES):
            text = self.cased(self.sheet.rng.choice(options))
            if alphanumerics(text) not in self.labels and self.sheet.width_of(text, bold=bold) <= max_px:
                break
        else:
            text = self.cased(min(options, key=len))
        self.labels.add(alphanumerics(text))
        return text

    def fit(self, make: Callable[[], str], max_px: float, *, scale: float = 1.0, bold: bool = False) -> str:
        """Make a text that is allowed, new on the page and not wider than `max_px`; see `Sheet.fit`."""
        return self.sheet.fit(lambda: self.cased(self.until(make)), max_px / scale, bold=bold)

    def put(self, text: str, **place: Any) -> Segment:
        """Place a text on the current row; arguments as of `Sheet.put`."""
        return self.sheet.put(text, self.row, **place)

    def line(self, text: str, **place: Any) -> None:
        """Write a text on a row of its own."""
        self.put(text, **place)
        self.row += 1

    def gap(self, share: float = 1.0) -> None:
        """Leave a row empty in this share of calls."""
        self.row += self.chance(share)

    def separator(self, share: float = 1.0) -> None:
        """Draw a row of dashes, dots, stars or a line. They are shapes: nobody wants them read as text."""
        if not self.chance(share):
            return
        sheet, y = self.sheet, (self.row + 0.5) * ROW_HEIGHT_PX
        look = sheet.rng.choice(("dashes", "dashes", "dashes", "double", "stars", "dots", "line"))
        tone = sheet.rng.uniform(0.6, 1)
        if look == "line":
            sheet.rule(y, px=sheet.rng.choice((1, 2, 3)))
        width, step = {"dots": (1.0, 6.0), "stars": (7.0, 14.0)}.get(
            look, sheet.rng.choice(((7.0, 12.0), (10.0, 14.0), (5.0, 9.0)))
        )
        x = sheet.left
        while look != "line" and x + width <= sheet.right:
            tops = {"double": (y - 3, y + 3), "dots": (y,)}.get(look, (y,))
            sheet.shapes += [Shape(box=(x, top, x + width, top + 1), tone=tone) for top in tops]
            if look == "stars":
                sheet.shapes.append(Shape(box=(x + 3, y - 3, x + 4, y + 4), tone=tone))
            x += step
        self.row += 1

    def _unstretched(self, piece: Segment) -> Segment:
        """Give a single character its natural width: the column that `Style.text_width` adds would make it fat."""
        if len(piece.text) > 1:
            return piece
        style = self.sheet.style.scaled(piece.scale)
        width = max(style.font(bold=piece.bold).getlength(piece.text) * style.squeeze, MIN_PITCH_PX)
        return replace(piece, left=piece.left + (piece.width - width) / 2, width=width)

    def finish(self) -> None:
        """Give the page its height."""
        self.sheet.segments = [self._unstretched(piece) for piece in self.sheet.segments]
        self.sheet.num_rows = self.row + self.sheet.rng.randint(0, 2)


def _titled(sheet: Sheet) -> Cursor:
    """Begin a page with its title, which is asked for."""
    page = Cursor(sheet=sheet, row=sheet.rng.randint(0, 2))
    rng, title = sheet.rng, sheet.make(makers.phrase, sheet.space / 1.4, bold=True)
    page.line(title, align=rng.choice(("left", "centre")), bold=True, scale=rng.choice((1.0, 1.2, 1.4)))
    sheet.ask(QUESTIONS["title"], answer=title)
    return page


def form_page(sheet: Sheet) -> None:
    """A title and sections of pairs of label and value, in one or two columns."""
    page, rng = _titled(sheet), sheet.rng
    if page.chance(0.6):
        page.line(sheet.make(makers.company, sheet.space), align=rng.choice(("left", "centre")))
    bold, ruled, colon = page.chance(0.3), page.chance(0.4), rng.choice((":", "", " :"))
    for section in range(rng.randint(3, 5)):
        page.gap(0.9)
        if page.chance(0.5):
            sheet.rule((page.row + 1) * ROW_HEIGHT_PX - 1)
        page.line(f"{section + 1}. {sheet.make(makers.phrase, sheet.space - 60, bold=True)}", bold=True)
        columns = rng.choice((1, 2, 2))
        for _ in range(rng.randint(3, 8)):
            _form_row(page, columns, bold=bold, colon=colon)
            if ruled:
                sheet.rule(page.row * ROW_HEIGHT_PX - 1)
    page.finish()


def _form_row(page: Cursor, columns: int, *, bold: bool, colon: str) -> None:
    """Write a row of one or two pairs."""
    sheet = page.sheet
    width = (sheet.space - GAP_PX * (columns - 1)) / columns
    for column in range(columns):
        if column and page.chance(0.1):
            continue
        left = sheet.left + column * (width + GAP_PX)
        key_px = width * 0.48 if columns == 2 else width * 0.36
        chosen = makers.any_of(makers.FIELD_MAKERS, sheet.rng)
        usual = sheet.rng.choice(list(makers.KEY_MAKERS))
        if page.chance(0.5) and belongs(usual, sheet.split):
            key = sheet.fit(lambda label=usual: page.cased(label), key_px - 30, bold=bold)  # type: ignore[misc]
            chosen = makers.KEY_MAKERS[usual] if key.lower() == usual.lower() else chosen
        else:
            key = sheet.make(makers.phrase, key_px - 30, bold=bold)
        value = sheet.make(chosen, width - key_px - GAP_PX)
        page.put(key + colon, left=left, bold=bold)
        page.put(value, left=left + key_px + GAP_PX)
        sheet.ask(QUESTIONS["field"], key, answer=value)
        if page.chance(0.15):
            sheet.ask(QUESTIONS["key"], value, answer=key)
    page.row += 1


def table_page(sheet: Sheet) -> None:
    """A title and a table of 10 to 30 rows and 3 to 6 columns; the first column names the row."""
    page, rng = _titled(sheet), sheet.rng
    if page.chance(0.5):
        page.line(sheet.make(rng.choice((makers.company, makers.date, makers.person)), sheet.space))
    page.gap(0.8)
    shares = [rng.uniform(1.1, 1.6), *(rng.uniform(0.85, 1.1) for _ in range(rng.randint(2, 5)))]
    step = (sheet.space + GAP_PX) / sum(shares)
    edges = [
        (sheet.left + step * sum(shares[:n]), sheet.left + step * sum(shares[: n + 1]) - GAP_PX)
        for n in range(len(shares))
    ]
    kinds = [rng.choice((makers.word, makers.phrase)), *(rng.choice(makers.COLUMN_MAKERS) for _ in shares[1:])]
    aligns = ["left", *rng.choices(("left", "right", "centre"), k=len(shares) - 1)]
    first, bold, look = page.row, page.chance(0.5), rng.choice(("plain", "header", "rules", "zebra", "dark", "grid"))
    header: list[str] = []
    for index in range(rng.randint(11, 31)):
        dark = look == "dark" and not header
        if dark or (look == "zebra" and index % 2):
            sheet.band(page.row, rng.uniform(0.85, 1.0) if dark else 0.1)
        elif look in ("rules", "grid") or (look == "header" and index == 1):
            sheet.rule(page.row * ROW_HEIGHT_PX)
        texts = [
            sheet.make(kind if header else makers.word, right - left, bold=not header)
            for kind, (left, right) in zip(kinds, edges, strict=True)
        ]
        for text, (left, right), align in zip(texts, edges, aligns, strict=True):
            page.put(text, left=left, right=right, align=align, bold=bold and not header, knockout=dark)
        page.row += 1
        if header:
            sheet.ask_cells(header, texts, row_share=0.2)
        header = header or texts
    if look == "grid":
        for x in (*(left - GAP_PX / 2 for left, _ in edges), sheet.right + GAP_PX / 2):
            box = (max(x, 0), first * ROW_HEIGHT_PX, max(x, 0), page.row * ROW_HEIGHT_PX)
            sheet.shapes.append(Shape(box=box, tone=0.7))
    page.gap(0.7)
    if page.chance(0.4):
        page.line(sheet.make(makers.phrase, sheet.space))
    page.finish()
