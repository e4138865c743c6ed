"""One synthetic document: a picture, its text lines, and a conversation about it, from a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from alignvlm_pl.errors import ConfigError, nearest

from . import grids, layouts, questions
from .lexicon import check_split
from .render import Box, render
from .sheet import Question, Sheet
from .style import COLUMN_WIDTH_PX, ROW_HEIGHT_PX, draw_style

LAYOUTS: dict[str, Callable[[Sheet], None]] = {
    "lines": layouts.lines,
    "form": layouts.form,
    "receipt": layouts.receipt,
    "table": grids.table,
    "chart": grids.chart,
}
KINDS = tuple(LAYOUTS)
SOURCE = "synthetic"
MIN_WIDTH_PX = 192
MIN_HEIGHT_PX = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A rendered document.

    Attributes:
        kind: ``lines``, ``form``, ``receipt``, ``table`` or ``chart``.
        image: Grey-level page, in px.
        encoded: The page as a file.
        extension: Format of the file, ``png`` or ``jpg``.
        turns: Questions with answers, in the order of the conversation.
        lines: Text of each row of the page, top to bottom, ``{"text", "box": [x0, y0, x1, y1]}`` in px.
    """

    kind: str
    image: Image.Image
    encoded: bytes
    extension: str
    turns: list[Question]
    lines: list[dict[str, Any]]

    def record(self, turns: list[Question] | None = None, *, references: bool = False) -> dict[str, Any]:
        """Return the JSON of a sample in normal form (datamodules/shards/sample.py).

        Args:
            turns: Part of the turns; all of them where None.
            references: List the accepted answer of the last turn, as evaluation sets do.
        """
        turns = self.turns if turns is None else turns
        record: dict[str, Any] = {
            "source": SOURCE,
            "task": f"{SOURCE}-{self.kind}",
            "messages": _messages(turns),
            "lines": self.lines,
        }
        if references:
            record["references"] = [turns[-1].answer]
        return record


def generate_document(
    seed: int,
    *,
    split: str,
    kind: str | None = None,
    fonts: str = "train",
    width: int = 256,
    height: int = 128,
    num_questions: int = 4,
    transcription_share: float = 0.1,
    fault_share: float = 0.67,
) -> Document:
    """Render one document. A pure function: the same arguments give the same bytes.

    Args:
        seed: Any whole number.
        split: ``train`` or ``heldout``: which words and values the page may show.
        kind: Layout; a random one of forms, receipts, tables and charts where None.
        fonts: ``train`` typefaces or the ``heldout`` ones.
        width: Width in px, a multiple of 8.
        height: Height in px, a multiple of 32: one line of text each.
        num_questions: Most turns of the conversation, at least 1.
        transcription_share: Share (0-1) of documents whose last turn asks for all text; ``lines`` always do.
        fault_share: Probability (0-1) of faults of paper, printer and scanner (blur, noise, worn strokes).

    Raises:
        ConfigError: An unknown split, kind or font set, a size that does not fit the grid, or a missing package.
    """
    _check(split, kind, width, height, num_questions)
    rng = Random(f"{seed}/{split}/{kind}/{fonts}/{width}x{height}")
    kind = kind or rng.choice(KINDS[1:])
    sheet = Sheet(
        rng=rng,
        split=split,
        style=draw_style(rng, fonts=fonts),
        width=width,
        num_rows=height // ROW_HEIGHT_PX,
        fault_share=fault_share,
    )
    LAYOUTS[kind](sheet)
    page = render(sheet)
    lines = _lines(sheet, page.boxes)
    turns = _turns(sheet, lines, num_questions, 1.0 if kind == "lines" else transcription_share)
    return Document(
        kind=kind, image=page.image, encoded=page.encoded, extension=page.extension, turns=turns, lines=lines
    )


def _check(split: str, kind: str | None, width: int, height: int, num_questions: int) -> None:
    check_split(split)
    if kind is not None and kind not in LAYOUTS:
        raise ConfigError(f"kind of a synthetic document: unknown {kind!r}; {nearest(kind, LAYOUTS)}")
    if width < MIN_WIDTH_PX or width % COLUMN_WIDTH_PX or height < MIN_HEIGHT_PX or height % ROW_HEIGHT_PX:
        raise ConfigError(
            f"size of a synthetic document: expected a width of at least {MIN_WIDTH_PX} in steps of {COLUMN_WIDTH_PX} "
            f"and a height of at least {MIN_HEIGHT_PX} in steps of {ROW_HEIGHT_PX} px, found {width}x{height}"
        )
    if num_questions < 1:
        raise ConfigError(f"questions per synthetic document: expected 1 or more, found {num_questions}")


def _lines(sheet: Sheet, boxes: list[Box]) -> list[dict[str, Any]]:
    """Join the texts of each row, left to right, with the hull of their boxes.

    CONTRACT: one entry per row of vision tokens, which is what the read warm start spells out per row.
    """
    rows: dict[int, list[tuple[Box, str]]] = {}
    for segment, box in zip(sheet.segments, boxes, strict=True):
        rows.setdefault(segment.row, []).append((box, segment.text))
    lines = []
    for _, parts in sorted(rows.items()):
        parts.sort(key=lambda part: part[0][0])
        hull = [pick(box[side] for box, _ in parts) for side, pick in enumerate((min, min, max, max))]
        lines.append({"text": " ".join(text for _, text in parts), "box": [round(edge, 1) for edge in hull]})
    return lines


def _turns(
    sheet: Sheet, lines: list[dict[str, Any]], num_questions: int, transcription_share: float
) -> list[Question]:
    """Choose the turns of the conversation from what can be asked about the page."""
    rng, chosen = sheet.rng, list(sheet.questions)
    rng.shuffle(chosen)
    chosen = chosen[:num_questions]
    if rng.random() < transcription_share or not chosen:
        text = "\n".join(line["text"] for line in lines)
        # Last, or the other answers could be copied from it instead of being read off the page.
        chosen = [*chosen[: num_questions - 1], Question(text=rng.choice(questions.TRANSCRIBE), answer=text)]
    return chosen


def _messages(turns: list[Question]) -> list[dict[str, Any]]:
    """Write turns as messages; the image stands before the first question."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        image = [] if messages else [{"type": "image", "index": 0}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages
