"""Makers of text: words, names and values in many formats, each kept on one side of the split by `draw`."""

import string
from collections.abc import Callable, Mapping
from random import Random

from .lexicon import Lexicon, alphanumerics, belongs, load_lexicon
from .words import MONTHS

Maker = Callable[[Random, Lexicon], str]
_UPPER, _LOWER, _DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
_MARKS = "#:/-()*&@.,%+=_'!?$<>[]\";|~^{}\\`"
_STREETS = "Street St. Road Rd. Avenue Ave Lane Drive Way Jalan Court Plaza Park".split()
_FIRMS = "Ltd,Inc.,GmbH,Co.,Sdn Bhd,LLC,S.A.,B.V.,PLC,& Sons,Trading,Group,Bros.".split(",")
_MONTH_WORDS = (*MONTHS, *(month[:3] for month in MONTHS))
_DAYS = tuple(f"{day:02d}" for day in range(1, 32)) + tuple(str(day) for day in range(1, 10))
_YEARS = tuple(str(year) for year in range(1960, 2040))
_CURRENCY_WORDS = "RM EUR USD CHF GBP SEK SGD AUD NOK PLN DKK CAD Rs kr".split()
_UNITS = "kg g ml L cm mm m km W V x pc h % KB GB".split()


def draw(rng: Random, split: str, maker: Maker) -> str:
    """Call a maker until its string may stand on a page of `split` and has two letters or digits."""
    words = load_lexicon(split)
    for _ in range(2000):
        value = " ".join(maker(rng, words).split())
        if len(alphanumerics(value)) >= 2 and belongs(value, split):
            return value
    raise AssertionError(f"maker {maker.__name__} never gave a value of the {split} split")


def digits(rng: Random, count: int) -> str:
    """Return random digits."""
    return f"{rng.randrange(10**count):0{count}d}"


def any_of(makers: Mapping[Maker, float], rng: Random) -> Maker:
    """Choose a maker by its weight."""
    return rng.choices(list(makers), list(makers.values()))[0]


def phrase(rng: Random, words: Lexicon) -> str:
    """One to three words, as a label or a product has."""
    count = rng.choices((1, 2, 3), (55, 35, 10))[0]
    return " ".join(words.word(rng, max_letters=12 if count == 1 else 8) for _ in range(count))


def word(rng: Random, words: Lexicon) -> str:
    """One word."""
    return words.word(rng)


def person(rng: Random, words: Lexicon) -> str:
    """First and last name, sometimes with an initial."""
    first, last = (words.word(rng, origin="names", max_letters=9).title() for _ in range(2))
    return rng.choice((f"{first} {last}", f"{last}, {first}", f"{rng.choice(_UPPER)}. {last}", f"{first} {last}"))


def company(rng: Random, words: Lexicon) -> str:
    """Name of a firm."""
    names = [words.word(rng, max_letters=9).title() for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.15:
        names.insert(1, "&") if len(names) == 2 else names.insert(0, rng.choice(_UPPER) + ".")
    firm = words.pick(rng, _FIRMS) if rng.random() < 0.5 else ""
    return " ".join([*names, firm])


def place(rng: Random, words: Lexicon) -> str:
    """Town, sometimes with a post code."""
    town = words.word(rng, origin="places").title()
    return town if rng.random() < 0.6 else f"{digits(rng, rng.choice((4, 5)))} {town}"


def address(rng: Random, words: Lexicon) -> str:
    """Street and number."""
    name, number = words.word(rng, origin="places", max_letters=9).title(), str(rng.randint(1, 999))
    street = words.pick(rng, _STREETS)
    return rng.choice((f"{number} {name} {street}", f"No.{number}, {street} {name}", f"{name} {street} {number}"))


def email(rng: Random, words: Lexicon) -> str:
    """E-mail address or web site, short."""
    name, host = (words.word(rng, max_letters=6) for _ in range(2))
    return rng.choice((f"{name}@{host}.com", f"{name[0]}.{host}@{name}.net", f"www.{host}.com", f"{host}.org/{name}"))


def marked(rng: Random, words: Lexicon) -> str:
    """A word or number inside punctuation, as receipts have it."""
    inner = words.word(rng, max_letters=8) if rng.random() < 0.6 else digits(rng, rng.randint(2, 6))
    shapes = (
        "({0})", "*{0}*", "{0} :", "{0}:", "# {0}", "@{0}", "{0} &", "[{0}]", "{0}?", "{0} !", "- {0} -", '"{0}"',
    )  # fmt: skip
    return rng.choice(shapes).format(inner)


def number(rng: Random, words: Lexicon) -> str:
    """Whole number of two to six digits, sometimes with thousands separators."""
    value = rng.randrange(10, 10 ** rng.randint(2, 6))
    return f"{value:,}" if rng.random() < 0.3 else str(value)


def decimal(rng: Random, words: Lexicon) -> str:
    """Number with one to three places."""
    return f"{rng.uniform(0, 10 ** rng.randint(1, 4)):.{rng.choice((1, 1, 2, 3))}f}"


def price(rng: Random, words: Lexicon) -> str:
    """Amount with two places, without currency."""
    value = 10 ** rng.uniform(0, 3.6)
    return f"{value:,.2f}" if rng.random() < 0.5 else f"{value:.2f}"


def amount(rng: Random, words: Lexicon) -> str:
    """Amount with or without a currency sign."""
    value = price(rng, words)
    shape = rng.randrange(8)
    if shape < 3:
        return rng.choice(("$", "$", "RM", "-$", "*")) + value
    if shape == 3:
        return f"{words.pick(rng, _CURRENCY_WORDS)} {value}"
    return f"{value}{rng.choice((' $', '-', '*', ' S'))}" if shape == 4 else value


def percent(rng: Random, words: Lexicon) -> str:
    """Percentage from 0 to 100, such as `7.5%`."""
    return rng.choice((f"{rng.randint(10, 99)}%", f"{rng.uniform(0, 100):.1f}%", f"{rng.uniform(0, 30):.2f} %"))


def date(rng: Random, words: Lexicon) -> str:
    """Date in one of a dozen notations."""
    day, month = words.pick(rng, _DAYS), words.pick(rng, _MONTH_WORDS)
    year, numeric = words.pick(rng, _YEARS), f"{rng.randint(1, 12):02d}"
    mark, short = rng.choice("/-."), str(rng.randint(2000, 2035))
    any_day = f"{rng.randint(1, 31):02d}"
    usual = mark.join((any_day, numeric, short))
    shapes = (
        usual, usual, mark.join((any_day, numeric, short[2:])), mark.join((short, numeric, any_day)),
        f"{day} {month} {year}", f"{month} {day}, {year}", f"{month} {year}", f"{any_day}-{month[:3]}-{short}",
    )  # fmt: skip
    return rng.choice(shapes)


def time(rng: Random, words: Lexicon) -> str:
    """Time of day."""
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    shapes = (f"{hour:02d}:{minute:02d}", f"{hour:02d}:{minute:02d}:{second:02d}", f"{hour % 12 + 1}:{minute:02d}PM")
    return rng.choice(shapes)


def phone(rng: Random, words: Lexicon) -> str:
    """Telephone number."""
    area, first, last = digits(rng, 3), digits(rng, 3), digits(rng, 4)
    shapes = (f"{area}-{first}-{last}", f"({area}){first}-{last}", f"+{area}{first}{last}", f"0{area}-{first}{last}")
    return rng.choice(shapes)


def quantity(rng: Random, words: Lexicon) -> str:
    """Number with a unit attached."""
    return rng.choice((str(rng.randint(10, 999)), f"{rng.uniform(0.1, 99):.1f}")) + rng.choice(_UNITS)


def code(rng: Random, words: Lexicon) -> str:
    """Invoice number, serial number, tax id."""
    letters = "".join(rng.choices(_UPPER, k=rng.randint(1, 2)))
    tail = digits(rng, rng.randint(3, 7))
    shapes = (
        letters + tail, f"{letters}-{tail}", f"{letters}{tail[:3]}-{digits(rng, 2)}", f"#{tail}",
        f"{tail}-{letters[0]}", f"({tail}-{letters[0]})", f"{letters}/{tail[:4]}", digits(rng, rng.randint(6, 12)),
        "".join(rng.choices(_UPPER + _DIGITS, k=rng.randint(5, 8))),
    )  # fmt: skip
    return rng.choice(shapes)


def signs(rng: Random, words: Lexicon) -> str:
    """Two to six capitals and digits."""
    return "".join(rng.choices(_UPPER + _DIGITS, k=rng.randint(2, 6)))


def scribble(rng: Random, words: Lexicon) -> str:
    """Random characters, all of printable ASCII: teaches every sign of the alphabet."""
    alphabet = rng.choice((_UPPER, _LOWER, _UPPER + _DIGITS + _MARKS, _UPPER + _LOWER + _DIGITS, _DIGITS + _MARKS))
    return "".join(rng.choices(alphabet, k=rng.randint(3, 8)))


FIELD_MAKERS: dict[Maker, float] = {
    phrase: 26, person: 12, company: 5, place: 6, amount: 14, date: 10, code: 10, number: 5,
    phone: 4, email: 3, quantity: 3, percent: 2, time: 3, decimal: 2, address: 3, scribble: 2,
}  # fmt: skip
"""Values of form fields and how often each kind appears."""
TEXT_MAKERS: dict[Maker, float] = {
    **FIELD_MAKERS, phrase: 34, company: 10, address: 10, scribble: 10, marked: 14, amount: 10,
}  # fmt: skip
"""What lines of pure text are made of."""
COLUMN_MAKERS: tuple[Maker, ...] = (number, price, decimal, percent, word, amount, number, word)
"""Columns of tables besides the first."""
KEY_MAKERS: dict[str, Maker] = {
    "Date": date, "Due date": date, "Invoice date": date, "Born": date, "Issued": date, "Valid until": date,
    "Invoice No": code, "Order": code, "Reference": code, "Customer No": code, "Account": code, "Tax ID": code,
    "Total": amount, "Amount due": amount, "Subtotal": amount, "Balance": amount, "Fee": amount, "Deposit": amount,
    "Name": person, "Cashier": person, "Customer": person, "Contact": person, "Signed": person, "Manager": person,
    "Phone": phone, "Tel": phone, "Fax": phone, "E-mail": email, "Website": email, "City": place, "Office": place,
    "Time": time, "Quantity": number, "Pages": number, "Members": number, "Company": company, "Supplier": company,
    "Department": phrase, "Product": phrase, "Status": phrase, "Subject": phrase, "Brand": phrase, "Color": phrase,
}  # fmt: skip
"""Usual keys of forms and the kinds of their values."""


def is_numeric(text: str) -> bool:
    """Whether a cell of a data file is a number, a date or the like."""
    return text[:1].isdigit() or text[:1] == "-"


def like(text: str) -> Maker:
    """Return a maker of stand-ins for a cell: of words, of any number, or of as many digits with the same marks."""
    count = sum(character.isdigit() for character in text)
    if not is_numeric(text):
        return word
    if count < 2 or sum(character.isalpha() for character in text) > 1:
        return number
    blanks = "".join("{}" if character.isdigit() else character for character in text)
    return lambda rng, words: blanks.format(*digits(rng, count))
