"""Layouts of running text: plain lines, forms and receipts. Grids (tables, charts) are in grids.py."""

from collections.abc import Callable

from . import questions
from .lexicon import belongs
from .makers import Maker, any_of, draw
from .names import company, email, person, phrase, place
from .sheet import Segment, Sheet
from .style import ROW_HEIGHT_PX
from .values import (
    FIELD_MAKERS,
    TEXT_MAKERS,
    amount,
    code,
    date,
    number,
    phone,
    price,
    time,
)

_KEY_PHRASES: dict[str, Maker] = {
    "Date": date, "Due date": date, "Invoice date": date, "Born": date, "Issued": date, "Valid until": date,
    "Invoice No": code, "Order": code, "Reference": code, "Customer No": code, "Account": code, "Tax ID": code,
    "Total": amount, "Amount due": amount, "Subtotal": amount, "Balance": amount, "Fee": amount, "Deposit": amount,
    "Name": person, "Cashier": person, "Customer": person, "Contact": person, "Signed": person, "Manager": person,
    "Phone": phone, "Tel": phone, "Fax": phone, "E-mail": email, "Website": email, "City": place, "Office": place,
    "Time": time, "Quantity": number, "Pages": number, "Members": number, "Company": company, "Supplier": company,
    "Department": phrase, "Product": phrase, "Status": phrase, "Subject": phrase, "Brand": phrase, "Color": phrase,
}  # fmt: skip
_SUM_KEYS = (
    "Total",
    "TOTAL",
    "Amount",
    "Sum",
    "Total due",
    "Net total",
    "Grand total",
    "Balance",
    "Cash",
    "To pay",
)
_SIGNS = ("", "", "", "$", "RM")
_REAL_KEY_SHARE = 0.3


def lines(sheet: Sheet) -> None:
    """Fill the rows with text of every kind; some rows hold two pieces, left and right."""
    # Sparse pages and short lines teach that paper without ink reads as nothing.
    count = max(sheet.num_rows - sheet.rng.choices((0, 1, 2, 3), (4, 3, 2, 3))[0], 1)
    for row in sorted(sheet.rng.sample(range(sheet.num_rows), count)):
        if sheet.rng.random() < 0.3:
            right = sheet.put(sheet.make(price, 90), row, align="right")
            sheet.put(_text(sheet, right.left - sheet.left - 14), row)
        else:
            text = _text(sheet, sheet.right - sheet.left)
            sheet.put(text, row, align=sheet.rng.choice(("left", "left", "centre", "right")))
    if sheet.rng.random() < 0.2:
        sheet.rule(ROW_HEIGHT_PX * sheet.rng.randint(1, sheet.num_rows - 1))


def _text(sheet: Sheet, max_px: float) -> str:
    """Join random pieces until the width is well used."""
    pieces = [sheet.make(any_of(TEXT_MAKERS, sheet.rng), max_px)]
    aim = sheet.rng.uniform(0.0, 1.0) * max_px
    for _ in range(6):
        left_px = max_px - sheet.width_of(" ".join([*pieces, "x"]))
        if max_px - left_px > aim or left_px < 60:
            break
        longer = [*pieces, sheet.make(any_of(TEXT_MAKERS, sheet.rng), left_px)]
        if sheet.width_of(" ".join(longer)) > max_px:
            break
        pieces = longer
    return " ".join(pieces)


def form(sheet: Sheet) -> None:
    """Pairs of key and value: on one line, in two columns, or the value below its key."""
    rows = list(range(sheet.num_rows))
    if len(rows) > 3 and sheet.rng.random() < 0.25:
        title = sheet.make(sheet.rng.choice((phrase, company)), sheet.right - sheet.left, bold=True)
        sheet.put(title, rows.pop(0), align=sheet.rng.choice(("left", "centre")), bold=True)
        questions.ask(sheet, questions.TITLE, answer=title)
    shape = sheet.rng.choices((_inline, _columns, _stacked), (50, 35, 15))[0]
    pairs = shape(sheet, rows)
    for key, value in pairs:
        questions.ask(sheet, questions.FIELD, key, answer=value)
    for key, value in pairs:
        if sheet.rng.random() < 0.15:
            questions.ask(sheet, questions.KEY, value, answer=key)


def _key_and_maker(sheet: Sheet, max_px: float, *, bold: bool = False) -> tuple[str, Maker]:
    """Choose a key, from the usual ones or from the lexicon, and the kind of its value."""
    rng, chosen = sheet.rng, any_of(FIELD_MAKERS, sheet.rng)
    if rng.random() < _REAL_KEY_SHARE:
        usual = rng.choice(list(_KEY_PHRASES))
        if belongs(usual, sheet.split):
            key = sheet.fit(lambda: sheet.cased(usual), max_px, bold=bold)
            return key, _KEY_PHRASES[usual] if key.lower() == usual.lower() else chosen
    return sheet.make(phrase, max_px, bold=bold), chosen


def _inline(sheet: Sheet, rows: list[int]) -> list[tuple[str, str]]:
    """`Key: value` as one text per row."""
    rng = sheet.rng
    mark = rng.choices((": ", " : ", ":", " - ", " = ", "; ", " > "), (50, 15, 10, 8, 7, 5, 5))[0]
    space, pairs = sheet.right - sheet.left, []
    for row in rows:
        key, maker = _key_and_maker(sheet, space * rng.uniform(0.3, 0.52))
        value = sheet.fit(_fitting(sheet, maker, key + mark, space), space)
        sheet.put(key + mark + value, row)
        pairs.append((key, value))
    return pairs


def _fitting(sheet: Sheet, maker: Maker, lead: str, space: float) -> Callable[[], str]:
    """Return a function that makes values which fit behind `lead`."""

    def make() -> str:
        for _ in range(12):
            text = sheet.value(maker)
            if sheet.width_of(lead + text) <= space:
                return text
        letters = max(4, int((space - sheet.width_of(lead)) / sheet.width_of("m")))
        return sheet.cased(sheet.words.lexicon.word(sheet.rng, max_letters=letters))

    return make


def _columns(sheet: Sheet, rows: list[int]) -> list[tuple[str, str]]:
    """Keys in a column on the left, values in a column, or flush right."""
    rng = sheet.rng
    space = sheet.right - sheet.left
    split_px = sheet.left + space * rng.uniform(0.36, 0.5)
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
        key, maker = _key_and_maker(sheet, sheet.right - sheet.left, bold=bold)
        value = sheet.make(maker, sheet.right - sheet.left - indent)
        sheet.put(key, key_row, bold=bold)
        placed = sheet.put(value, value_row, left=sheet.left + indent)
        if sheet.rng.random() < 0.3:
            sheet.rule(
                (value_row + 1) * ROW_HEIGHT_PX - 1, right=max(placed.left + placed.width, sheet.right - 40)
            )
        pairs.append((key, value))
    return pairs + (_inline(sheet, rows[-1:]) if len(rows) % 2 else [])


def receipt(sheet: Sheet) -> None:
    """Company, sometimes a line about the sale, items with prices, and a sum at the bottom."""
    rng = sheet.rng
    rows = list(range(sheet.num_rows))
    name = sheet.make(company, sheet.right - sheet.left, bold=True)
    sheet.put(name, rows.pop(0), align=rng.choice(("centre", "centre", "left")), bold=rng.random() < 0.5)
    questions.ask(sheet, questions.COMPANY, answer=name)
    if len(rows) > 2 and rng.random() < (0.3 if len(rows) == 3 else 0.7):
        row = rows.pop(0)
        detail = sheet.make(rng.choice((date, phone, code, date)), sheet.right - sheet.left)
        sheet.put(detail, row, align=rng.choice(("centre", "left", "right")))
    for row, value in zip(rows, _prices(sheet, len(rows) - 1, rng.choice(_SIGNS)), strict=True):
        _receipt_row(sheet, row, value, last=row == rows[-1])


def _prices(sheet: Sheet, count: int, sign: str) -> list[str]:
    """Prices and their sum (after a rounding, where there is one item), all different and all allowed."""
    rng, found = sheet.rng, list[int]()

    def shown(cents: int) -> str:
        return f"{sign}{cents / 100:.2f}"

    while True:
        while len(found) < count:
            cents = int(10 ** rng.uniform(2, 4.3))
            if belongs(shown(cents), sheet.split):
                found.append(cents)
        total = sum(found) + (rng.randint(1, 900) if count == 1 else 0)
        if len({*found, total}) == count + 1 and belongs(shown(total), sheet.split):
            return [shown(cents) for cents in (*found, total)]
        found.clear()


def _receipt_row(sheet: Sheet, row: int, value: str, *, last: bool) -> None:
    """An item, or the sum, with its amount flush right."""
    rng = sheet.rng
    bold = last and rng.random() < 0.5
    amount_: Segment = sheet.put(value, row, align="right", bold=bold)
    left = sheet.left
    if last and rng.random() < 0.4:
        sheet.rule(row * ROW_HEIGHT_PX + 1, px=rng.choice((1, 2)))
    if not last and rng.random() < 0.15:
        left = sheet.put(str(rng.randint(1, 9)), row).left + 30
    space = amount_.left - left - 14
    if last and rng.random() < 0.5:
        usual = [key for key in _SUM_KEYS if belongs(key, sheet.split)] or [draw(rng, sheet.split, phrase)]
        label = sheet.fit(lambda: sheet.cased(rng.choice(usual)), space, bold=bold)
    else:
        label = sheet.make(phrase, space, bold=bold)
    colon = ":" if rng.random() < 0.4 and sheet.width_of(label + ":", bold=bold) <= space else ""
    sheet.put(label + colon, row, left=left, bold=bold)
    questions.ask(sheet, questions.FIELD if last else questions.PRICE, label, answer=value)
    if not last and rng.random() < 0.3:
        questions.ask(sheet, questions.ITEM, value, answer=label)
