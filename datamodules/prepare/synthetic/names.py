"""Texts made of words: labels, persons, firms, places, addresses, and words inside punctuation."""

from random import Random

from .makers import Words, digits

_STREETS = (
    "Street",
    "St.",
    "Road",
    "Rd.",
    "Avenue",
    "Ave",
    "Lane",
    "Drive",
    "Way",
    "Jalan",
    "Court",
    "Plaza",
    "Park",
)
_FIRMS = (
    "Ltd",
    "Inc.",
    "GmbH",
    "Co.",
    "Sdn Bhd",
    "LLC",
    "S.A.",
    "B.V.",
    "PLC",
    "& Sons",
    "Trading",
    "Group",
    "Bros.",
)
_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def phrase(rng: Random, words: Words) -> str:
    """One to three words, as a label or a product has."""
    count = rng.choices((1, 2, 3), (55, 35, 10))[0]
    return " ".join(words.lexicon.word(rng, max_letters=12 if count == 1 else 8) for _ in range(count))


def word(rng: Random, words: Words) -> str:
    """One word."""
    return words.lexicon.word(rng)


def person(rng: Random, words: Words) -> str:
    """First and last name, sometimes with an initial."""
    first, last = (words.lexicon.word(rng, origin="names", max_letters=9).title() for _ in range(2))
    return rng.choice(
        (f"{first} {last}", f"{last}, {first}", f"{rng.choice(_UPPER)}. {last}", f"{first} {last}")
    )


def company(rng: Random, words: Words) -> str:
    """Name of a firm."""
    names = [words.lexicon.word(rng, max_letters=9).title() for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.15:
        names.insert(1, "&") if len(names) == 2 else names.insert(0, rng.choice(_UPPER) + ".")
    firm = words.pick(rng, _FIRMS) if rng.random() < 0.5 else ""
    return " ".join([*names, firm])


def place(rng: Random, words: Words) -> str:
    """Town, sometimes with a post code."""
    town = words.lexicon.word(rng, origin="places").title()
    return town if rng.random() < 0.6 else f"{digits(rng, rng.choice((4, 5)))} {town}"


def address(rng: Random, words: Words) -> str:
    """Street and number."""
    name, number = words.lexicon.word(rng, origin="places", max_letters=9).title(), str(rng.randint(1, 999))
    street = words.pick(rng, _STREETS)
    return rng.choice(
        (f"{number} {name} {street}", f"No.{number}, {street} {name}", f"{name} {street} {number}")
    )


def email(rng: Random, words: Words) -> str:
    """E-mail address or web site, short."""
    name, host = (words.lexicon.word(rng, max_letters=6) for _ in range(2))
    return rng.choice(
        (f"{name}@{host}.com", f"{name[0]}.{host}@{name}.net", f"www.{host}.com", f"{host}.org/{name}")
    )


def marked(rng: Random, words: Words) -> str:
    """A word or number inside punctuation, as receipts have it."""
    inner = words.lexicon.word(rng, max_letters=8) if rng.random() < 0.6 else digits(rng, rng.randint(2, 6))
    shapes = (
        "({0})",
        "*{0}*",
        "{0} :",
        "{0}:",
        "# {0}",
        "@{0}",
        "{0} &",
        "[{0}]",
        "{0}?",
        "{0} !",
        "- {0} -",
        '"{0}"',
    )
    return rng.choice(shapes).format(inner)
