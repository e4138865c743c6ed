"""The content of a page before it is drawn: texts on rows of 32 px, shapes, and questions that they answer.

Content is drawn until it fits, so no text is ever cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from PIL import Image

from .lexicon import alphanumerics, load_lexicon
from .makers import Maker, draw
from .style import ROW_HEIGHT_PX, Style
from .words import QUESTIONS

_TRIES = 40
_TRIES_OF_WORDS = 400
_OTHER_CASE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of text, verbatim, on one row (0 at the top); `left` edge and `width` in px.

    With `knockout` it is set in the colour of the paper on a dark shape, and so exactly in the middle of the row.
    `scale` is its size in sizes of the document.
    """

    text: str
    row: int
    left: float
    width: float
    bold: bool = False
    knockout: bool = False
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A rule, box or bar: `box` is (x0, y0, x1, y1) in px, `tone` is 0 for paper to 1 for ink."""

    box: tuple[float, float, float, float]
    tone: float
    filled: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about the page, and the text printed on it that answers it."""

    text: str
    answer: str


@dataclass(kw_only=True, slots=True)
class Sheet:
    """Texts, shapes and questions of one document; `width` in px, `num_rows` of 32 px, shapes are drawn before text.

    `left`, `right` and `space` are edges and width of the text area in px. `skew_deg` is the standard deviation of the
    angle of a page that is skewed. The `usual` questions are asked before all other ones. A `picture` is at the top; of
    a segment whose index is in `covers` only that share of its height shows, at its upper and at its lower edge.
    """

    rng: Random
    split: str
    style: Style
    width: int
    num_rows: int
    fault_share: float = 0.67
    skew_deg: float = 0.5
    segments: list[Segment] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    usual: list[Question] = field(default_factory=list)
    picture: Image.Image | None = None
    covers: dict[int, float] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    @property
    def left(self) -> float:
        return float(self.style.margin_px)

    @property
    def right(self) -> float:
        return float(self.width - self.style.margin_px)

    @property
    def space(self) -> float:
        return self.right - self.left

    def width_of(self, text: str, *, bold: bool = False, scale: float = 1.0) -> float:
        """Return the width in px of a text in the style of this document."""
        return self.style.scaled(scale).text_width(text, bold=bold)

    def cased(self, text: str) -> str:
        """Set words in lower or title case in the letter case of this document; ``mixed`` chooses one for each text."""
        case = self.style.case
        if case == "mixed":
            case = self.rng.choice(("upper", "title", "lower", "sentence"))
        if case == "title":
            return " ".join(token[:1].upper() + token[1:] for token in text.split(" "))
        return {"upper": text.upper(), "lower": text.lower(), "sentence": text[:1].upper() + text[1:]}[case]

    def make(self, maker: Maker, max_px: float, *, bold: bool = False) -> str:
        """Make a text that fits into `max_px` and differs from all others made for this page."""
        return self.fit(lambda: self.value(maker), max_px, bold=bold)

    def fit(self, make: Callable[[], str], max_px: float, *, bold: bool = False) -> str:
        """Call `make` until its text fits and is new on this page; if it never does, use ever shorter words."""
        for attempt in range(-_TRIES, _TRIES_OF_WORDS):
            text = make() if attempt < 0 else self.short_word(max(4, 7 - (attempt + 1) // 20))
            if alphanumerics(text) not in self._used and self.width_of(text, bold=bold) <= max_px:
                self._used.add(alphanumerics(text))
                return text
        raise AssertionError(f"no word of the {self.split} split fits into {max_px:.0f} px")

    def short_word(self, max_letters: int) -> str:
        """Make a word of at most that many letters, at least 4."""
        return self.cased(load_lexicon(self.split).word(self.rng, max_letters=max_letters))

    def value(self, maker: Maker) -> str:
        """Make one text, without regard to its width: words take the case of the document, values may keep theirs."""
        text = draw(self.rng, self.split, maker)
        if self.style.case in ("upper", "lower") or (text.replace(" ", "").isalpha() and text.islower()):
            return self.cased(text)
        return text

    def put(
        self,
        text: str,
        row: int,
        *,
        left: float | None = None,
        right: float | None = None,
        align: str = "left",
        bold: bool = False,
        knockout: bool = False,
        scale: float = 1.0,
    ) -> Segment:
        """Place a text between `left` and `right` (the margins by default), aligned left, right or centre."""
        left = self.left if left is None else left
        right = self.right if right is None else right
        width = self.width_of(text, bold=bold, scale=scale)
        slack = {"left": 0.0, "right": right - left - width, "centre": (right - left - width) / 2}[align]
        segment = Segment(text=text, row=row, left=left + slack, width=width, bold=bold, knockout=knockout, scale=scale)
        self.segments.append(segment)
        return segment

    def rule(self, y: float, *, left: float | None = None, right: float | None = None, px: float = 1.0) -> None:
        """Add a horizontal line."""
        left = self.left if left is None else left
        right = self.right if right is None else right
        self.shapes.append(Shape(box=(left, y, right, y + px - 1), tone=self.rng.uniform(0.4, 1.0)))

    def band(self, row: int, tone: float) -> None:
        """Shade a whole row."""
        top = row * ROW_HEIGHT_PX
        self.shapes.append(Shape(box=(0, top + 1, self.width, top + ROW_HEIGHT_PX - 2), tone=tone))

    def ask(self, templates: Sequence[str], *labels: str, answer: str) -> None:
        """Add a question: a phrasing that quotes labels of the page, and the text on it that answers, verbatim."""
        quoted = []
        for label in labels:
            other = self.rng.random() < _OTHER_CASE_SHARE
            quoted.append(self.rng.choice((label.lower(), label.upper(), label.title())) if other else label)
        self.questions.append(Question(text=self.rng.choice(templates).format(*quoted), answer=answer))

    def ask_cells(self, header: list[str], texts: list[str], *, row_share: float) -> None:
        """Ask for the cells of a row of a table, and in a share (0-1) of them for the row that holds the cell."""
        for name, text in zip(header[1:], texts[1:], strict=True):
            self.ask(QUESTIONS["cell"], name, texts[0], answer=text)
            if self.rng.random() < row_share:
                self.ask(QUESTIONS["row"], header[0], name, text, answer=texts[0])
