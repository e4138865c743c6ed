"""Whole receipts: company, address, facts of the sale, items, sums, payment, tax summary and closing lines.

Each page shows several dates and amounts, so that the date and the total have to be found by their labels. The sums are
right: items add up to the total, and what was paid less the total is the change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .pages import GAP_PX, Cursor
from .sheet import Question, Sheet
from .words import (
    COLUMNS,
    CURRENCIES,
    LABELS,
    PLACES,
    QUESTIONS,
    RATES,
    RECEIPT_QUESTIONS,
    SUMMARY_HEADS,
    TAXES,
)

_NOTES = (5, 10, 20, 50, 100)
_TRIES = 200
_TAX_SLACK = range(-5, 6)
"""Cents: tax is rounded by item, so that of the sum is a few cents off."""


class Item(NamedTuple):
    """A line of the items: description, quantity, and price in cents for one."""

    text: str
    quantity: int
    price: int

    @property
    def amount(self) -> int:
        return self.quantity * self.price


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Amounts in cents below the items; `net` is without tax, `gross` with tax and `total` rounded to 5 cents."""

    goods: int
    discount: int
    net: int
    tax: int
    gross: int
    total: int


@dataclass(kw_only=True, slots=True)
class Receipt:
    """A receipt that is being written, and what holds for all of it."""

    page: Cursor
    tax: str
    rate: int
    currency: str
    sign: str  # what stands before each amount below the items
    inclusive: bool  # of tax: the prices of the items
    align: str  # of the lines above and below

    @property
    def sheet(self) -> Sheet:
        return self.page.sheet

    def money(self, cents: int) -> str:
        """Return an amount below the items as printed."""
        return f"{'-' if cents < 0 else ''}{self.sign}{abs(cents) / 100:,.2f}"

    def may_show(self, *amounts: int) -> bool:
        """Say whether these amounts in cents are of the split."""
        return all(self.page.allowed(self.money(cents)) for cents in amounts)

    def label(self, options: Sequence[str], max_px: float = 1e9, *, bold: bool = False) -> str:
        """Choose a usual label and put the tax and the currency into it."""
        return self.page.label([self.filled(option) for option in options], max_px, bold=bold)

    def filled(self, text: str) -> str:
        """Put the tax and the currency into a text."""
        return text.format(tax=self.tax, rate=self.rate, currency=self.currency)

    def ask_usual(self, name: str, answer: str) -> None:
        """Add one of the four questions that each receipt answers, under its usual name half of the time."""
        text = self.sheet.rng.choice((f"What is the {name}?", self.sheet.rng.choice(RECEIPT_QUESTIONS[name])))
        self.sheet.usual.append(Question(text=text, answer=answer))


def receipt_page(sheet: Sheet) -> None:
    """Write all blocks of a receipt, from top to bottom."""
    rng = sheet.rng
    currency, page = rng.choice(CURRENCIES), Cursor(sheet=sheet, row=rng.randint(1, 3))
    receipt = Receipt(
        page=page,
        tax=rng.choice(TAXES),
        rate=rng.choice(RATES),
        currency=currency,
        sign=currency if rng.random() < 0.18 else "",
        inclusive=rng.random() < 0.5,
        align="centre" if rng.random() < 0.75 else "left",
    )
    _head(receipt)
    page.separator(0.3)
    page.gap(0.5)
    _facts(receipt)
    if page.chance(0.12):
        _customer(receipt)
    items, sums = _amounts(receipt)
    _items(receipt, items)
    _sums(receipt, items, sums)
    if page.chance(0.45):
        _tax_summary(receipt, sums)
    _closing(receipt)
    page.finish()


def _head(receipt: Receipt) -> None:
    page, rng = receipt.page, receipt.sheet.rng
    if page.chance(0.05):
        page.line(page.code("A99999", "99999999"), align=rng.choice(("left", "right")))
    title = [] if page.chance(0.1) else [receipt.label(LABELS["titles"])]
    if title and page.chance(0.15):
        title = [rng.choice(("* {0} *", "*** {0} ***", "-- {0} --")).format(*title)]
    early = page.chance(0.08)
    bold, scale = page.chance(0.3), rng.choice((1.0, 1.0, 1.1, 1.25))
    for text in title if early else []:
        page.line(text, align=receipt.align, bold=bold, scale=scale)
    _company(receipt)
    address = _address(receipt)
    for line in address:
        page.line(line, align=receipt.align)
    receipt.ask_usual("address", " ".join(address))
    _contacts(receipt)
    page.gap(0.8)
    for text in [] if early else title:
        page.line(text, align=receipt.align, bold=bold, scale=scale)
        page.gap(0.8)


def _company(receipt: Receipt) -> None:
    """Write the name of the company, and below or behind it the number of its registration or its branch."""
    page, rng, space = receipt.page, receipt.sheet.rng, receipt.sheet.space
    scale, bold = rng.choice((1.0, 1.0, 1.15, 1.3, 1.5)), page.chance(0.4)
    name = page.fit(lambda: _company_name(page), space, scale=scale, bold=bold)
    names = [name]
    if page.chance(0.15):
        names.append(page.fit(lambda: rng.choice(LABELS["shops"]) + " " + page.words(1), space, scale=scale, bold=bold))
    number = page.code("(99999-A)", "(999999-A)", "(999999 A)", "99999999-A", "(9999999-A)", "(A9999999)")
    behind = page.chance(0.3) and receipt.sheet.width_of(f"{names[-1]}  {number}", bold=bold, scale=scale) <= space
    for text in names[:-1]:
        page.line(text, align=receipt.align, bold=bold, scale=scale)
    page.line(f"{names[-1]} {number}" if behind else names[-1], align=receipt.align, bold=bold, scale=scale)
    if not behind and page.chance(0.6):
        reg = rng.choice(("", "", page.cased("Co. Reg. No") + ": ", page.cased("ROC") + " "))
        page.line(f"{reg}{number}", align=receipt.align)
    if page.chance(0.15):
        page.line(page.fit(lambda: f"({page.words(1, origin='places')} Branch)", space), align=receipt.align)
    receipt.ask_usual("company", " ".join(names))


def _company_name(page: Cursor) -> str:
    rng = page.sheet.rng
    words = page.words(
        rng.choice((1, 1, 2, 2, 3)), origin=rng.choice(("names", "places", "common", "foreign")), max_letters=9
    )
    shop, firm = rng.choice(LABELS["shops"]), rng.choice(LABELS["firms"])
    return rng.choice(
        (f"{words} {firm}", f"{words} {firm}", f"{words} {shop} {firm}", f"{shop} {words}", f"{words} {shop}")
    )


def _customer(receipt: Receipt) -> None:
    """Write name and address of the buyer, which are not those that are asked for."""
    page = receipt.page
    page.gap()
    page.line(page.cased("Bill To") + ":")
    page.line(page.fit(lambda: _company_name(page), receipt.sheet.space))
    for line in _address(receipt):
        page.line(line)


def _address(receipt: Receipt) -> list[str]:
    """Return an address in two to four lines."""
    page, sheet, rng = receipt.page, receipt.sheet, receipt.sheet.rng
    end = rng.choice((",", ",", ""))
    parts = [page.until(lambda: _street(page)) + end]
    for _ in range(rng.choice((0, 1, 1, 2))):
        tail = rng.choice(("", "", " " + str(rng.randint(1, 9))))
        parts.append(f"{rng.choice(LABELS['areas'])} {page.words(1, origin='places')}{tail}{end}")
    town, state = (page.words(rng.choice((1, 1, 2)), origin="places", max_letters=9) for _ in range(2))
    code = page.code("99999", "99999", "9999", "A99 9A") if page.chance(0.9) else ""
    town = rng.choice((f"{code} {town}", f"{code} {town}", f"{code}, {town}", f"{town} {code}")).strip(" ,")
    parts.append(town + end if page.chance(0.7) else town)
    if page.chance(0.6) or len(parts) < 3:
        parts.append(rng.choice((state, state, f"{state} {rng.choice(LABELS['states'])}")))
    lines: list[str] = []
    for index, part in enumerate(map(page.cased, parts)):
        longer = f"{lines[-1]} {part}" if lines else part
        joined = index > 0 and (index == len(parts) - 1 or len(lines) == 4 or page.chance(0.3)) and len(lines) > 1
        if joined and sheet.width_of(longer) <= sheet.space:
            lines[-1] = longer
        else:
            lines.append(page.sheet.fit(lambda text=part: text, sheet.space))  # type: ignore[misc]
    lines[-1] = lines[-1].rstrip(",") + rng.choice(("", "", "."))
    if sheet.width_of(lines[-1]) > sheet.space:
        lines[-1] = lines[-1].rstrip(".")
    return lines


def _street(page: Cursor) -> str:
    """Return a number with a street."""
    rng = page.sheet.rng
    number = rng.choice(PLACES).format(page.code("99", "999", "99-9", "9999", "99A", "A-99", "99 & 99"))
    name = page.words(rng.choice((1, 1, 2)), origin=rng.choice(("places", "names")), max_letters=8)
    tail = rng.choice(("", " " + page.code("9", "9/9", "99/9", "9/99", "99")))
    return f"{number} " + rng.choice(
        (f"{rng.choice(LABELS['streets'])} {name}{tail}",) * 3 + (f"{name} {rng.choice(LABELS['roads'])}",)
    )


def _contacts(receipt: Receipt) -> None:
    """Write telephone, tax number and the like, a line each; sometimes two in one line."""
    page, sheet, rng = receipt.page, receipt.sheet, receipt.sheet.rng
    phones = ("99-99999999", "99-9999 9999", "999-9999999", "(99)9999-9999", "+999-999-9999", "99-99999999")
    mark = rng.choice((": ", " : ", ":", ". ", " "))
    tax = receipt.tax if receipt.tax != "Tax" else "GST"
    fields = [(rng.choice(("Tel", "Tel", "Phone", "H/P")), page.code(*phones))]
    if page.chance(0.4):
        fields.append(("Fax", page.code(*phones)))
    if page.chance(0.15):
        fields.append(
            (rng.choice(("Email", "Website")), page.words(1, max_letters=8).lower() + rng.choice(("@", ".")) + "com")
        )
    if page.chance(0.75):
        name = rng.choice((f"{tax} ID", f"{tax} Reg No", f"{tax} No", f"{tax} ID No"))
        fields.append((name, page.code("999999999999", "999999999999", "A99999999", "9999 9999 9999")))
    texts = []
    for label, value in fields:
        label, value = page.cased(label), page.cased(value)
        sheet.ask(QUESTIONS["field"], label, answer=value)
        texts.append(f"{label}{mark}{value}")
    while texts:
        if len(texts) > 1 and page.chance(0.3) and sheet.width_of(f"{texts[0]} {texts[1]}") <= sheet.space:
            texts[:2] = [f"{texts[0]} {texts[1]}"]
        page.line(texts.pop(0), align=receipt.align)


def _facts(receipt: Receipt) -> None:
    """Write number, date, time, cashier and so on, as `label: value`; sometimes two of them in one row."""
    page, rng = receipt.page, receipt.sheet.rng
    facts = _other_facts(receipt)
    rng.shuffle(facts)
    facts = facts[: rng.randint(2, 8)]
    date, time = page.date(), page.time()
    receipt.ask_usual("date", date)
    with_time = page.chance(0.45)
    label = "" if page.chance(0.25) else receipt.label(LABELS["dates"][:7] if with_time else LABELS["dates"])
    facts.insert(rng.randint(0, len(facts)), (label, f"{date} {time}" if with_time else date))
    if not with_time and page.chance(0.6):
        facts.insert(rng.randint(0, len(facts)), (receipt.label(("Time",)), time))
    mark = rng.choice((": ", ": ", " : ", ":", " "))
    in_columns, in_pairs = page.chance(0.4), rng.choice((0.0, 0.0, 0.5, 0.9))
    _write_facts(receipt, facts, mark, in_columns=in_columns, in_pairs=in_pairs)
    for label, value in facts:
        if label and date not in value:
            receipt.sheet.ask(QUESTIONS["field"], label, answer=value)


def _other_facts(receipt: Receipt) -> list[tuple[str, str]]:
    """Return labels and values of what receipts tell beside the date, further dates among it."""
    page, rng = receipt.page, receipt.sheet.rng
    person = lambda: page.cased(page.words(rng.choice((1, 1, 2)), origin="names", max_letters=9))  # noqa: E731
    small = lambda: page.code("99", "9", "99", "999", "A9")  # noqa: E731
    number = ("AA99999999", "99999999", "A-999999", "9999999", "A99999", "INV-99999", "999/999999", "AA999-99999")
    makers: list[tuple[Sequence[str], Callable[[], str]]] = [
        (("Invoice No", "Receipt No", "Bill No", "Doc No", "Receipt #", "Tax Invoice No"), lambda: page.code(*number)),
        (("Order No", "Ref", "Trx No", "Trx ID", "Order #"), lambda: page.code(*number)),
        (("Cashier", "Operator", "Server", "Staff", "Cashier ID"), person),
        (("Salesperson", "Customer", "Member", "Bill To"), person),
        (("Counter", "Terminal", "Till", "POS No"), small),
        (("Table", "Table No"), small),
        (("Pax", "Pax No"), lambda: str(rng.randint(1, 9))),
        (("Member No", "Customer No", "Account"), lambda: page.code("99999999", "A99999")),
        (LABELS["other_dates"], page.date),
        (("Page",), lambda: str(rng.randint(1, 9))),
    ]
    return [(receipt.label(labels), make()) for labels, make in makers]


def _write_facts(
    receipt: Receipt, facts: list[tuple[str, str]], mark: str, *, in_columns: bool, in_pairs: float
) -> None:
    page, sheet = receipt.page, receipt.sheet
    queue, colon_px = list(facts), sheet.space * sheet.rng.uniform(0.26, 0.36)
    while queue:
        label, value = queue.pop(0)
        text = f"{label}{mark}{value}" if label else value
        if in_columns and label and sheet.width_of(label) + GAP_PX <= colon_px:
            lead = mark.strip() + " " if mark.strip() else ""
            page.put(label)
            placed = page.put(lead + value, left=sheet.left + colon_px)
        else:
            placed = page.put(page.sheet.fit(lambda text=text: text, sheet.space))  # type: ignore[misc]
        if queue and page.chance(in_pairs):
            label, value = queue[0]
            text = f"{label}{mark}{value}" if label else value
            left = max(placed.left + placed.width + GAP_PX, sheet.left + sheet.space * 0.56)
            if left + sheet.width_of(text) <= sheet.right:
                page.put(text, left=left, align=sheet.rng.choice(("left", "right")))
                queue.pop(0)
        page.row += 1


def _amounts(receipt: Receipt) -> tuple[list[Item], Sums]:
    """Choose items and sums that fit together, each amount of the split."""
    page, rng = receipt.page, receipt.sheet.rng
    texts = [_description(receipt) for _ in range(min(1 + int(rng.expovariate(0.2)), 11))]
    while True:
        top, discounted, rounded = rng.uniform(2.9, 4.4), page.chance(0.25), page.chance(0.4)
        *items, last = (_priced(receipt, text, top) for text in texts)
        for _ in range(_TRIES):
            goods = last.amount + sum(item.amount for item in items)
            sums = _sums_of(receipt, goods, discounted=discounted, rounded=rounded)
            if sums:
                return [*items, last], sums
            last = _priced(receipt, last.text, top)


def _sums_of(receipt: Receipt, goods: int, *, discounted: bool, rounded: bool) -> Sums | None:
    """Find a discount and a tax with which all sums are of the split; None where there are none."""
    rng = receipt.sheet.rng
    if not receipt.may_show(goods):
        return None
    discounts = [0]
    if discounted:
        discounts = [goods * share // 100 for share in (10, 5, 20)] + [
            rng.randint(1, 1 + goods // 3) for _ in range(200)
        ]
    share = receipt.rate / (100 + receipt.rate if receipt.inclusive else 100)
    for discount in discounts:
        after = goods - discount
        if discounted and not (discount and receipt.may_show(after, -discount)):
            continue
        for slack in rng.sample(_TAX_SLACK, len(_TAX_SLACK)):
            tax = max(round(after * share) + slack, 1)
            net, gross = (after - tax, after) if receipt.inclusive else (after, after + tax)
            total = round(gross / 5) * 5 if rounded else gross
            if receipt.may_show(tax, net, gross, total):
                return Sums(goods=goods, discount=discount, net=net, tax=tax, gross=gross, total=total)
    return None


def _priced(receipt: Receipt, text: str, top: float) -> Item:
    """Draw quantity and price until the price and the amount are of the split; prices are 10 to the power of `top`."""
    rng = receipt.sheet.rng
    while True:
        cents = int(10 ** rng.uniform(2, top))
        item = Item(text, rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 8)), cents - cents % rng.choice((1, 5, 10)))
        if all(receipt.page.allowed(_plain(amount)) for amount in (item.price, item.amount)):
            return item


def _plain(cents: int) -> str:
    return f"{cents / 100:,.2f}"


def _description(receipt: Receipt) -> str:
    """Return the name of a product that fits about half of the width."""
    page, rng = receipt.page, receipt.sheet.rng

    def make() -> str:
        words = page.words(rng.choice((1, 2, 2, 3)), origin=rng.choice(("common", "common", "foreign")), max_letters=9)
        size = rng.choice(
            ("", "", "", "", " " + page.code("99KG", "999ML", "99PCS", "99G", "9.9L", "99CM", "A99"), " (A)", " (S)")
        )
        return rng.choice(("", "", "", "", "", "A. ")) + words + size

    return page.fit(make, receipt.sheet.space * 0.5)


_SHAPES: dict[tuple[str, ...], int] = {
    ("desc qty price amount",): 3,
    ("desc qty price amount tax",): 3,
    ("qty desc amount",): 3,
    ("qty desc amount tax",): 2,
    ("desc amount",): 1,
    ("desc qty amount",): 1,
    ("desc", "code qty price amount tax"): 3,
    ("desc", "code qty price amount"): 2,
    ("desc", "times amount"): 2,
    ("desc", "times amount tax"): 1,
    ("code qty price amount", "desc"): 2,
    ("code qty price amount tax", "desc"): 2,
}
"""Columns of the row or rows of an item, and how often they are like this."""
_LEFT_ALIGNED = ("desc", "code", "times")


def _items(receipt: Receipt, items: list[Item]) -> None:
    page, rng = receipt.page, receipt.sheet.rng
    page.gap(0.7)
    shape = rng.choices(list(_SHAPES), list(_SHAPES.values()))[0]
    rows = [row.split() for row in shape]
    if max(_columns(receipt, row)["desc" if "desc" in row else row[0]][2] for row in rows if len(row) > 1) < 1:
        rows = [["desc"], ["times", "amount"]]
    if "desc" in rows[0] and len(rows[0]) > 1:
        left, right, _ = _columns(receipt, rows[0])["desc"]
        if any(receipt.sheet.width_of(item.text) > right - left for item in items):
            rows = [["desc"], ["times", "amount"]]
    page.separator(0.5)
    if page.chance(0.75):
        _items_header(receipt, rows)
        page.separator(0.5)
    codes = ("9999", "9999999999999", "AA99999", "99999999", "999999")
    code_shape = rng.choice(codes)
    times = rng.choice(("{0} x {1}", "{0} X {1}", "{0} @ {1}", "@{1} *{0}", "{0} @{1}"))
    tax_code = rng.choice(LABELS["tax_codes"])
    loose = page.chance(0.1) and len(items) < 6
    for item in items:
        cells = {
            "desc": item.text,
            "code": page.code(code_shape),
            "qty": str(item.quantity),
            "price": _plain(item.price),
            "amount": _plain(item.amount),
            "times": times.format(item.quantity, _plain(item.price)),
            "tax": tax_code,
        }
        for row in rows:
            for name, (left, right, _) in _columns(receipt, row).items():
                page.put(cells[name], left=left, right=right, align="left" if name in _LEFT_ALIGNED else "right")
            page.row += 1
        page.gap(loose)
        _ask_item(receipt, item, shown={name for row in rows for name in row})
    page.separator(0.6) if page.chance(0.8) else page.gap()


def _columns(receipt: Receipt, row: list[str]) -> dict[str, tuple[float, float, float]]:
    """Return left edge, right edge and spare px of each column; one of them takes the width that the others leave."""
    sheet = receipt.sheet
    samples = {"qty": "Qty", "price": "9,999.99", "amount": "99,999.99", "tax": "ZRL", "times": "9 X 9,999.99"}
    samples["code"] = "9999999999999"
    flexible = "desc" if "desc" in row else row[0]
    widths = {name: sheet.width_of(samples[name].upper()) for name in row if name != flexible}
    spare = sheet.space - sum(widths.values()) - GAP_PX * len(widths)
    least = 0.3 * sheet.space if flexible == "desc" else sheet.width_of(samples[flexible])
    widths[flexible] = spare
    edges, left = {}, sheet.left
    for name in row:
        edges[name] = (left, left + widths[name], spare - least)
        left += widths[name] + GAP_PX
    return edges


def _items_header(receipt: Receipt, rows: list[list[str]]) -> None:
    """Write the heads of the columns of the row with the amounts."""
    page, sheet = receipt.page, receipt.sheet
    row = next(row for row in rows if "amount" in row)
    bold = page.chance(0.2)
    for name, (left, right, _) in _columns(receipt, row).items():
        options = COLUMNS["desc" if name in ("code", "times") and len(rows) > 1 else name]
        texts = [page.cased(receipt.filled(text)) for text in options]
        texts = [text for text in texts if sheet.width_of(text, bold=bold) <= right - left]
        if texts:
            align = "left" if name in _LEFT_ALIGNED else "right"
            page.put(sheet.rng.choice(texts), left=left, right=right, align=align, bold=bold)
    page.row += 1


def _ask_item(receipt: Receipt, item: Item, *, shown: set[str]) -> None:
    sheet, amount = receipt.sheet, _plain(item.amount)
    sheet.ask(QUESTIONS["price"] if item.quantity == 1 else QUESTIONS["amount"], item.text, answer=amount)
    if shown & {"price", "times"} and item.quantity > 1:
        sheet.ask(QUESTIONS["unit_price"], item.text, answer=_plain(item.price))
    if shown & {"qty", "times"} and receipt.page.chance(0.3):
        sheet.ask(QUESTIONS["quantity"], item.text, answer=str(item.quantity))


def _sums(receipt: Receipt, items: list[Item], sums: Sums) -> None:
    """Write everything between the items and what was paid, the total as the last but the payment."""
    page, rng = receipt.page, receipt.sheet.rng
    rows: list[tuple[Sequence[str], str]] = []
    if page.chance(0.35):
        count = len(items) if page.chance(0.5) else sum(item.quantity for item in items)
        if page.allowed(str(count)):
            rows.append((LABELS["counts"], str(count)))
    bare = len(items) == 1 and not sums.discount and receipt.inclusive
    if page.chance(0.2 if bare else 0.75) or sums.discount:
        rows.append((LABELS["subtotals"], receipt.money(sums.goods)))
    if sums.discount:
        rows.append((LABELS["discounts"], receipt.money(-sums.discount)))
    if not receipt.inclusive or page.chance(0.5):
        if page.chance(0.4):
            rows.append((LABELS["nets"], receipt.money(sums.net)))
        rows.append((LABELS["tax_labels"], receipt.money(sums.tax)))
    if sums.total != sums.gross or page.chance(0.25):
        if page.chance(0.7):
            rows.append((LABELS["gross"], receipt.money(sums.gross)))
        rows.append((LABELS["roundings"], receipt.money(sums.total - sums.gross)))
    side, mark = rng.choice(("left", "left", "indented", "right")), rng.choice(("", "", ":", " :"))
    own_currency = not receipt.sign and page.chance(0.15)
    style = (side, mark, receipt.currency if own_currency else "")
    for labels, value in rows:
        _sum_row(receipt, labels, value, style)
    page.separator(0.3)
    big = rng.choice((1.0, 1.0, 1.0, 1.25, 1.45))
    labels = LABELS["rounded_totals"] if sums.total != sums.gross else LABELS["totals"]
    total = receipt.money(sums.total)
    label = _sum_row(receipt, labels, total, style, bold=page.chance(0.45), scale=big)
    receipt.ask_usual("total", total)
    receipt.sheet.ask(QUESTIONS["field"], label, answer=total)
    page.separator(0.3)
    _payment(receipt, sums.total, style)
    page.separator(0.3)


def _sum_row(
    receipt: Receipt,
    labels: Sequence[str],
    value: str,
    style: tuple[str, str, str],
    *,
    bold: bool = False,
    scale: float = 1.0,
) -> str:
    """Write a label and an amount flush right; returns the label, and asks for the amount unless it is the total."""
    page, sheet = receipt.page, receipt.sheet
    side, mark, currency = style
    amount = page.put(value, align="right", bold=bold, scale=scale)
    edge = amount.left - GAP_PX
    if currency and "." in value:
        column = sheet.right - sheet.width_of("9,999.99") - GAP_PX
        edge = page.put(currency, right=min(edge, column), align="right").left - GAP_PX
    left = sheet.left + (sheet.space * 0.25 if side == "indented" else 0)
    label = receipt.label(labels, (edge - left - sheet.width_of(mark)) / scale, bold=bold)
    if sheet.width_of(label + mark, bold=bold, scale=scale) > edge - left:
        left, scale = sheet.left, 1.0
    right_edge = min(edge, sheet.right - sheet.width_of("9,999.99") - 2 * GAP_PX)
    fits = sheet.width_of(label + mark, bold=bold, scale=scale) < right_edge - left
    align = "right" if side == "right" and fits else "left"
    page.put(label + mark, left=left, right=right_edge, align=align, bold=bold, scale=scale)
    page.row += 1
    if labels not in (LABELS["totals"], LABELS["rounded_totals"]):
        sheet.ask(QUESTIONS["field"], label, answer=value)
    return label


def _payment(receipt: Receipt, total: int, style: tuple[str, str, str]) -> None:
    """Write what was paid, in cash with the change or by card."""
    page, rng = receipt.page, receipt.sheet.rng
    notes = {-(-total // (100 * note)) * 100 * note for note in _NOTES}
    notes |= {-(-total // 100) * 100 + 100 * n for n in range(60)}
    likely = [cash for cash in notes if cash > total and receipt.may_show(cash, cash - total)]
    likely.sort(key=lambda cash: (cash % 500 > 0, cash))
    if page.chance(0.15) or not likely:
        _sum_row(receipt, LABELS["cards"] if page.chance(0.6) else LABELS["cash"], receipt.money(total), style)
        if page.chance(0.6):
            _sum_row(receipt, LABELS["changes"], receipt.money(0), style)
    else:
        cash = rng.choice(likely[:4])
        _sum_row(receipt, LABELS["cash"], receipt.money(cash), style)
        _sum_row(receipt, LABELS["changes"], receipt.money(cash - total), style)


def _tax_summary(receipt: Receipt, sums: Sums) -> None:
    """Write the table of tax codes, the last one of a second rate without tax."""
    page, sheet, rng = receipt.page, receipt.sheet, receipt.sheet.rng
    page.gap(0.7)
    if page.chance(0.6):
        page.line(receipt.label(LABELS["summaries"]), align=rng.choice(("left", "left", receipt.align)))
    edges = [sheet.left + sheet.space * share for share in (0.0, 0.38, 0.72, 1.0)]
    heads = rng.choice(SUMMARY_HEADS)
    code = rng.choice(("SR", "S", "SR", "T")) + rng.choice(
        ("", f" ({receipt.rate}%)", f" @ {receipt.rate}%", f" {receipt.rate}%")
    )
    rows = [
        tuple(page.cased(receipt.filled(head)) for head in heads),
        (code, receipt.money(sums.net), receipt.money(sums.tax)),
    ]
    if page.chance(0.25):
        rows.append((rng.choice(("ZR", "Z", "ZRL")) + rng.choice((" (0%)", "")), receipt.money(0), receipt.money(0)))
    if page.chance(0.3):
        rows.append((page.cased("Total"), receipt.money(sums.net), receipt.money(sums.tax)))
    fits = all(
        sheet.width_of(text) <= right - left - GAP_PX
        for row in rows
        for text, left, right in zip(row, edges, edges[1:], strict=False)
    )
    for row in rows if fits else rows[1:]:
        for text, left, right, align in zip(row, edges, edges[1:], ("left", "right", "right"), strict=False):
            page.put(text, left=left, right=right, align=align)
        page.row += 1


def _closing(receipt: Receipt) -> None:
    page, sheet, rng = receipt.page, receipt.sheet, receipt.sheet.rng
    page.gap()
    page.gap(0.3)
    page.separator(0.25)
    lines = [receipt.label(LABELS["closings"], sheet.space) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
    if page.chance(0.15):
        lines.append(f"{page.cased('Exchange before')} {page.date()}")
    if page.chance(0.15):
        lines.append(f"{page.cased('Printed')}: {page.date()} {page.time()}")
    if page.chance(0.1):
        lines.append(page.fit(lambda: f"Owned by {_company_name(page)}", sheet.space))
    for line in lines:
        if sheet.width_of(line) <= sheet.space:
            page.line(line, align=receipt.align)
