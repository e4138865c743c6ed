"""Layouts: plain lines, single strings, forms, receipts, tables (many with rows of real datasets) and bar charts."""

from collections.abc import Callable
from typing import Any

from . import makers
from .lexicon import alphanumerics, belongs, read_table
from .makers import draw
from .sheet import Shape, Sheet
from .style import ROW_HEIGHT_PX
from .words import QUESTIONS

_SUM_KEYS = "Total,TOTAL,Amount,Sum,Total due,Net total,Grand total,Balance,Cash,To pay".split(",")
_SIGNS = ("", "", "", "$", "RM")
_REAL_KEY_SHARE = 0.3
_REAL_TABLES = (
    "cars.json", "barley.json", "stocks.csv", "airports.csv", "seattle-weather.csv", "iris.json", "wheat.json",
    "driving.json", "ohlc.json", "burtin.json", "iowa-electricity.csv", "us-employment.csv", "crimea.json",
)  # fmt: skip
_REAL_TABLE_SHARE = 0.45
_GAP_PX = 16
_MIN_COLUMN_PX = 100  # narrower, and few words and numbers of 24 px letters would fit
_SUPERLATIVE_SHARES = {"train": (0.8, 0.5), "heldout": (0.5, 0.25)}
"""Charts that ask for the longest and the shortest bar: comparing takes more practice than reading does."""


def lines(sheet: Sheet) -> None:
    """Fill the rows with text of every kind; some rows hold two pieces, left and right."""
    # Sparse pages and short lines teach that paper without ink reads as nothing.
    count = max(sheet.num_rows - sheet.rng.choices((0, 1, 2, 3), (4, 3, 2, 3))[0], 1)
    for row in sorted(sheet.rng.sample(range(sheet.num_rows), count)):
        if sheet.rng.random() < 0.3:
            right = sheet.put(sheet.make(makers.price, 90), row, align="right")
            sheet.put(_text(sheet, right.left - sheet.left - 14), row)
        else:
            text = _text(sheet, sheet.space)
            sheet.put(text, row, align=sheet.rng.choice(("left", "left", "centre", "right")))
    if sheet.rng.random() < 0.2:
        sheet.rule(ROW_HEIGHT_PX * sheet.rng.randint(1, sheet.num_rows - 1))


def string(sheet: Sheet) -> None:
    """A few signs, anywhere on one row: the least that a model can learn to read."""
    text = draw(sheet.rng, sheet.split, makers.signs)
    left = sheet.rng.uniform(sheet.left, sheet.right - sheet.width_of(text))
    sheet.put(text, sheet.rng.randrange(sheet.num_rows), left=left)


def _text(sheet: Sheet, max_px: float) -> str:
    """Join random pieces until the width is well used."""
    pieces = [sheet.make(makers.any_of(makers.TEXT_MAKERS, sheet.rng), max_px)]
    aim = sheet.rng.uniform(0.0, 1.0) * max_px
    for _ in range(6):
        left_px = max_px - sheet.width_of(" ".join([*pieces, "x"]))
        if max_px - left_px > aim or left_px < 60:
            break
        longer = [*pieces, sheet.make(makers.any_of(makers.TEXT_MAKERS, sheet.rng), left_px)]
        if sheet.width_of(" ".join(longer)) > max_px:
            break
        pieces = longer
    return " ".join(pieces)


def form(sheet: Sheet) -> None:
    """Pairs of key and value: on one line, in two columns, or the value below its key."""
    rows = list(range(sheet.num_rows))
    if len(rows) > 3 and sheet.rng.random() < 0.25:
        _title(sheet, rows.pop(0), sheet.rng.choice((makers.phrase, makers.company)))
    shape = sheet.rng.choices((_inline, _columns, _stacked), (50, 35, 15))[0]
    pairs = shape(sheet, rows)
    for key, value in pairs:
        sheet.ask(QUESTIONS["field"], key, answer=value)
    for key, value in pairs:
        if sheet.rng.random() < 0.15:
            sheet.ask(QUESTIONS["key"], value, answer=key)


def _title(sheet: Sheet, row: int, maker: makers.Maker) -> None:
    title = sheet.make(maker, sheet.space, bold=True)
    sheet.put(title, row, align=sheet.rng.choice(("left", "centre")), bold=True)
    sheet.ask(QUESTIONS["title"], answer=title)


def _key_and_maker(sheet: Sheet, max_px: float, *, bold: bool = False) -> tuple[str, makers.Maker]:
    """Choose a key, from the usual ones or from the lexicon, and the kind of its value."""
    rng, chosen = sheet.rng, makers.any_of(makers.FIELD_MAKERS, sheet.rng)
    if rng.random() < _REAL_KEY_SHARE:
        usual = rng.choice(list(makers.KEY_MAKERS))
        if belongs(usual, sheet.split):
            key = sheet.fit(lambda: sheet.cased(usual), max_px, bold=bold)
            return key, makers.KEY_MAKERS[usual] if key.lower() == usual.lower() else chosen
    return sheet.make(makers.phrase, max_px, bold=bold), chosen


def _inline(sheet: Sheet, rows: list[int]) -> list[tuple[str, str]]:
    """`Key: value` as one text per row."""
    rng = sheet.rng
    mark = rng.choices((": ", " : ", ":", " - ", " = ", "; ", " > "), (50, 15, 10, 8, 7, 5, 5))[0]
    pairs = []
    for row in rows:
        key, maker = _key_and_maker(sheet, sheet.space * rng.uniform(0.3, 0.52))
        value = sheet.fit(_fitting(sheet, maker, key + mark), sheet.space)
        sheet.put(key + mark + value, row)
        pairs.append((key, value))
    return pairs


def _fitting(sheet: Sheet, maker: makers.Maker, lead: str) -> Callable[[], str]:
    """Return a function that makes values which fit behind `lead`."""

    def make() -> str:
        for _ in range(12):
            text = sheet.value(maker)
            if sheet.width_of(lead + text) <= sheet.space:
                return text
        return sheet.short_word(max(4, int((sheet.space - sheet.width_of(lead)) / sheet.width_of("m"))))

    return make


def _columns(sheet: Sheet, rows: list[int]) -> list[tuple[str, str]]:
    """Keys in a column on the left, values in a column, or flush right."""
    rng = sheet.rng
    split_px = sheet.left + sheet.space * rng.uniform(0.36, 0.5)
    colon, bold, align = rng.choice((":", "", "", " :")), rng.random() < 0.3, rng.choice(("left", "right"))
    ruled, pairs = rng.random() < 0.3, []
    for row in rows:
        key, maker = _key_and_maker(sheet, split_px - sheet.left - 30, bold=bold)
        value = sheet.make(maker, sheet.right - split_px - 4)
        sheet.put(key + colon, row, bold=bold)
        sheet.put(value, row, left=split_px + 4, align=align)
        if ruled:
            sheet.rule((row + 1) * ROW_HEIGHT_PX - 1, left=rng.choice((sheet.left, split_px)))
        pairs.append((key, value))
    return pairs


def _stacked(sheet: Sheet, rows: list[int]) -> list[tuple[str, str]]:
    """Each value on the row below its key; a row that is left over takes an inline pair."""
    bold, indent, pairs = sheet.rng.random() < 0.5, sheet.rng.uniform(0, 24), []
    for key_row, value_row in zip(rows[0::2], rows[1::2], strict=False):
        key, maker = _key_and_maker(sheet, sheet.space, bold=bold)
        value = sheet.make(maker, sheet.space - indent)
        sheet.put(key, key_row, bold=bold)
        placed = sheet.put(value, value_row, left=sheet.left + indent)
        if sheet.rng.random() < 0.3:
            sheet.rule((value_row + 1) * ROW_HEIGHT_PX - 1, right=max(placed.left + placed.width, sheet.right - 40))
        pairs.append((key, value))
    return pairs + (_inline(sheet, rows[-1:]) if len(rows) % 2 else [])


def receipt(sheet: Sheet) -> None:
    """Company, sometimes a line about the sale, items with prices, and a sum at the bottom."""
    rng = sheet.rng
    rows = list(range(sheet.num_rows))
    name = sheet.make(makers.company, sheet.space, bold=True)
    sheet.put(name, rows.pop(0), align=rng.choice(("centre", "centre", "left")), bold=rng.random() < 0.5)
    sheet.ask(QUESTIONS["company"], answer=name)
    if len(rows) > 2 and rng.random() < (0.3 if len(rows) == 3 else 0.7):
        row = rows.pop(0)
        kind = rng.choice((makers.date, makers.phone, makers.code, makers.date))
        detail = sheet.make(kind, sheet.space)
        sheet.put(detail, row, align=rng.choice(("centre", "left", "right")))
    for row, value in zip(rows, _prices(sheet, len(rows) - 1, rng.choice(_SIGNS)), strict=True):
        _receipt_row(sheet, row, value, last=row == rows[-1])


def _prices(sheet: Sheet, count: int, sign: str) -> list[str]:
    """Prices and their sum (after a rounding, where there is one item), all different and all allowed."""
    rng, found = sheet.rng, list[int]()

    def format_price(cents: int) -> str:
        return f"{sign}{cents / 100:.2f}"

    while True:
        while len(found) < count:
            cents = int(10 ** rng.uniform(2, 4.3))
            if belongs(format_price(cents), sheet.split):
                found.append(cents)
        total = sum(found) + (rng.randint(1, 900) if count == 1 else 0)
        if len({*found, total}) == count + 1 and belongs(format_price(total), sheet.split):
            return [format_price(cents) for cents in (*found, total)]
        found.clear()


def _receipt_row(sheet: Sheet, row: int, value: str, *, last: bool) -> None:
    """An item, or the sum, with its amount flush right."""
    rng = sheet.rng
    bold = last and rng.random() < 0.5
    amount = sheet.put(value, row, align="right", bold=bold)
    left = sheet.left
    if last and rng.random() < 0.4:
        sheet.rule(row * ROW_HEIGHT_PX + 1, px=rng.choice((1, 2)))
    if not last and rng.random() < 0.15:
        left = sheet.put(str(rng.randint(1, 9)), row).left + 30
    space = amount.left - left - 14
    if last and rng.random() < 0.5:
        usual = [key for key in _SUM_KEYS if belongs(key, sheet.split)] or [
            makers.draw(rng, sheet.split, makers.phrase)
        ]
        label = sheet.fit(lambda: sheet.cased(rng.choice(usual)), space, bold=bold)
    else:
        label = sheet.make(makers.phrase, space, bold=bold)
    colon = ":" if rng.random() < 0.4 and sheet.width_of(label + ":", bold=bold) <= space else ""
    sheet.put(label + colon, row, left=left, bold=bold)
    sheet.ask(QUESTIONS["field"] if last else QUESTIONS["price"], label, answer=value)
    if not last and rng.random() < 0.3:
        sheet.ask(QUESTIONS["item"], value, answer=label)


def table(sheet: Sheet) -> None:
    """A header and rows of two or three columns; the first column names the row."""
    rng = sheet.rng
    most = int((sheet.space + _GAP_PX) // (_MIN_COLUMN_PX + _GAP_PX))
    num_columns = 3 if most > 2 and rng.random() < 0.45 else 2
    edges = _column_edges(sheet, num_columns)
    widths = [right - left for left, right in edges]
    cells = _real_cells(sheet, widths) if rng.random() < _REAL_TABLE_SHARE else _made_cells(sheet, widths)
    bold, aligns = rng.random() < 0.4, ["left", *rng.choices(("left", "right", "centre"), k=num_columns - 1)]
    knockout = _table_shapes(sheet, edges)
    for row, texts in enumerate(cells):
        for text, (left, right), align in zip(texts, edges, aligns, strict=True):
            head = row == 0
            sheet.put(text, row, left=left, right=right, align=align, knockout=knockout and head, bold=bold and head)
    header, *body = cells
    for texts in body:
        sheet.ask_cells(header, texts, row_share=0.3)


def _column_edges(sheet: Sheet, num_columns: int) -> list[tuple[float, float]]:
    """Cut the width into columns of varied but never tiny widths."""
    space = sheet.space - _GAP_PX * (num_columns - 1)
    shares = [sheet.rng.uniform(0.85, 1.15) for _ in range(num_columns)]
    edges, left = [], sheet.left
    for share in shares:
        right = left + space * share / sum(shares)
        edges.append((left, right))
        left = right + _GAP_PX
    return edges


def _made_cells(sheet: Sheet, widths: list[float]) -> list[list[str]]:
    """Cells from the lexicon and the value makers: words in the first column, one kind in each other."""
    kinds = [makers.word, *(sheet.rng.choice(makers.COLUMN_MAKERS) for _ in widths[1:])]
    header = [sheet.make(makers.word, width, bold=True) for width in widths]
    return [header] + [
        [sheet.make(kind, width) for kind, width in zip(kinds, widths, strict=True)] for _ in range(sheet.num_rows - 1)
    ]


def _real_cells(sheet: Sheet, widths: list[float]) -> list[list[str]]:
    """Header and rows of a real dataset; a cell that is too wide, repeated or of the other split is replaced."""
    records = read_table(sheet.rng.choice(_REAL_TABLES))
    columns = sheet.rng.sample(list(records[0]), min(len(widths), len(records[0])))
    columns.sort(key=lambda name: makers.is_numeric(str(records[0][name])))
    count = sheet.num_rows - 1
    rows = sheet.rng.sample(records, count) if count <= len(records) else sheet.rng.choices(records, k=count)
    texts = [[name.replace("_", " ").split(" ")[0] for name in columns]]
    texts += [[_format_cell(row.get(name)) for name in columns] for row in rows]
    for row_texts in texts:
        row_texts += [""] * (len(widths) - len(columns))
    return [
        [_real_cell(sheet, text, width, bold=row == 0) for text, width in zip(row_texts, widths, strict=True)]
        for row, row_texts in enumerate(texts)
    ]


def _format_cell(value: Any) -> str:
    """Format a cell of a data file: numbers with at most two places, texts by their first two words."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return " ".join(str(value if value is not None else "").split()[:2])


def _real_cell(sheet: Sheet, text: str, width: float, *, bold: bool) -> str:
    """Return a cell as it is, or a stand-in of its kind if it is not allowed or does not fit."""
    good = text.isascii() and len(alphanumerics(text)) >= 2 and belongs(text, sheet.split)

    def make() -> str:
        nonlocal good
        if good:
            good = False
            return sheet.cased(text)
        made = makers.draw(sheet.rng, sheet.split, makers.like(text))
        return sheet.cased(made) if made.isalpha() else made

    return sheet.fit(make, width, bold=bold)


def _table_shapes(sheet: Sheet, edges: list[tuple[float, float]]) -> bool:
    """Add rules, shades or a grid; returns whether the header is to be set in the colour of the paper."""
    rng, last = sheet.rng, sheet.num_rows * ROW_HEIGHT_PX - 1
    look = rng.choice(("plain", "header", "rules", "grid", "zebra", "dark"))
    if look == "dark":
        sheet.band(0, rng.uniform(0.85, 1.0))
    elif look == "zebra":
        for row in range(1, sheet.num_rows, 2):
            sheet.band(row, rng.uniform(0.06, 0.16))
    elif look != "plain":
        for row in (1,) if look == "header" else range(sheet.num_rows + 1):
            sheet.rule(min(last, row * ROW_HEIGHT_PX))
    if look == "grid":
        for x in [edges[0][0] - 3, *(right + _GAP_PX / 2 for _, right in edges[:-1]), edges[-1][1] + 2]:
            sheet.shapes.append(Shape(box=(x, 0, x, last), tone=rng.uniform(0.4, 1.0)))
    return look == "dark"


def chart(sheet: Sheet) -> None:
    """Bars with a label and a printed value each, lying or standing."""
    values = _upright(sheet) if sheet.rng.random() < 0.45 else _lying(sheet)
    for label, text, _ in values:
        sheet.ask(QUESTIONS["bar"], label, answer=text)
        if sheet.rng.random() < 0.3:
            sheet.ask(QUESTIONS["bar_of"], text, answer=label)
    ordered = sorted(values, key=lambda entry: entry[2])
    largest_share, smallest_share = _SUPERLATIVE_SHARES[sheet.split]
    if sheet.rng.random() < largest_share:
        sheet.ask(QUESTIONS["largest"], answer=ordered[-1][0])
    if sheet.rng.random() < smallest_share:
        sheet.ask(QUESTIONS["smallest"], answer=ordered[0][0])


def _bar_values(sheet: Sheet, count: int, label_px: float, value_px: float) -> list[tuple[str, str, float]]:
    """Labels with values as printed and as shares of the largest, 0.1 to 1."""
    rng = sheet.rng
    places, unit, power = rng.choice((0, 0, 1)), rng.choice(("", "", "", "%", "k", "M")), rng.choice((2, 3, 3, 4))
    found: list[tuple[str, str, float]] = []
    attempts = 0
    while len(found) < count:
        attempts += 1
        if attempts % 100 == 0:  # too wide for this style, or too few values of the split: three digits always do
            places, unit, power, found = 0, "", 3, []
        size = round(rng.uniform(0.12, 1.0) * 10**power, places)
        text = f"{size:.{places}f}{unit}"
        fits = sheet.width_of(text) <= value_px and len(alphanumerics(text)) >= 2
        # Bars must differ visibly, or "which is the longest" could not be answered by looking.
        if fits and belongs(text, sheet.split) and all(abs(size - other[2]) > 0.04 * 10**power for other in found):
            found.append(("", text, size))
    return [(sheet.make(makers.word, label_px), text, size / 10**power) for _, text, size in found]


def _lying(sheet: Sheet) -> list[tuple[str, str, float]]:
    """One bar per row: label, bar, value at its end."""
    rng, rows = sheet.rng, list(range(sheet.num_rows))
    if len(rows) > 3 and rng.random() < 0.3:
        _title(sheet, rows.pop(0), makers.phrase)
    start, value_px = sheet.left + sheet.space * 0.42, sheet.space * 0.3
    values = _bar_values(sheet, len(rows), start - sheet.left - 6, value_px)
    half, tone, filled = rng.uniform(5, 11), rng.uniform(0.25, 1.0), rng.random() < 0.8
    for row, (label, text, share) in zip(rows, values, strict=True):
        middle, end = (row + 0.5) * ROW_HEIGHT_PX, start + (sheet.space * 0.58 - value_px - 8) * share
        sheet.shapes.append(Shape(box=(start, middle - half, end, middle + half), tone=tone, filled=filled))
        sheet.put(label, row, left=sheet.left, right=start - 6, align=rng.choice(("left", "right")))
        sheet.put(text, row, left=end + 6, right=sheet.right)
    return values


def _upright(sheet: Sheet) -> list[tuple[str, str, float]]:
    """Standing bars between a row of values at the top and a row of labels at the bottom."""
    rng = sheet.rng
    count = 2 if sheet.width < 240 else rng.choice((2, 3))
    step = sheet.space / count
    values = _bar_values(sheet, count, step - 10, step - 10)
    floor, room = (sheet.num_rows - 1) * ROW_HEIGHT_PX, (sheet.num_rows - 2) * ROW_HEIGHT_PX - 2
    tone, thick = rng.uniform(0.25, 1.0), step * rng.uniform(0.25, 0.45)
    for index, (label, text, share) in enumerate(values):
        left = sheet.left + index * step
        middle = left + step / 2
        box = (middle - thick, floor - room * share, middle + thick, floor - 1)
        sheet.shapes.append(Shape(box=box, tone=tone, filled=rng.random() < 0.9))
        sheet.put(text, 0, left=left + 5, right=left + step - 5, align="centre")
        sheet.put(label, sheet.num_rows - 1, left=left + 5, right=left + step - 5, align="centre")
    sheet.rule(floor)
    return values
