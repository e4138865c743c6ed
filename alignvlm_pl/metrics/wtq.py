"""WikiTableQuestions: do two lists of items denote the same values?

References: `due` = `due_evaluator/scorers/wtq_scorer.py` as DocOwl1.5 (mPLUG-DocOwl f91a7685) calls it, with
letter case ignored; `docowl` = the same after DocOwl's clean-up of answers; `official` = `evaluator.py` 1.0.2 of
ppasupat/WikiTableQuestions 7d455a5a, `official-canonical` = the same with the canonical values of the data set;
`vlmevalkit` = the copy inside its TableVQA-Bench (e8e78f05).
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from alignvlm_pl.errors import DataError

from .base import Answer, Metric, Statistics, check_rule, mean_figures
from .text import collapse, without_newlines

RULES = ("due", "docowl", "official", "official-canonical", "vlmevalkit")

_NEAR = 1e-6  # two numbers that are no further apart are one
_QUOTES = {ord(mark): "'" for mark in "‘’´`"} | {ord(mark): '"' for mark in "“”"}
_DASHES = {ord(mark): "-" for mark in "‐‑‒–—−"}
_MARKS = _QUOTES | _DASHES
_CITATION = (
    r"(?!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+]"  # any brackets but leading ones, a number in brackets, a mark
)
_CITATIONS = re.compile(rf"(?:{_CITATION})+$")
_REMARKS = re.compile(r"(?: \([^)]*\))+$")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True, slots=True)
class _Number:
    amount: float


@dataclass(frozen=True, slots=True)
class _Date:
    year: int
    month: int
    day: int


Denotation = _Number | _Date | None
"""What an item means apart from its text; None: nothing but its text."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of an answer: its normalised text and what it means."""

    text: str
    meaning: Denotation


def wtq(
    prediction: str | Sequence[str],
    references: Sequence[str],
    *,
    rule: str = "due",
    canonical: Sequence[str] | None = None,
) -> float:
    """1 where both lists denote the same set of values, else 0.

    Repeated values count once. Items are equal when their normalised texts are, when both are numbers (as Python
    reads them: `1,000` is none) within 1e-6, or when both are the same date.

    Args:
        prediction: The model's answer, or its items. A text is one item under `due` and `docowl`; the others split
            it, at tabs (`official`) or at `|` (`vlmevalkit`).
        references: All items of the right answer. They are no alternatives: all must be given.
        rule: Reference that is reproduced.
        canonical: For `official-canonical`: canonical forms of the references; without them it equals `official`.

    Raises:
        ConfigError: There is no such rule.
        DataError: There are more or fewer canonical forms than references.
    """
    check_rule("wtq", rule, RULES)
    given = _SPLIT[rule](prediction) if isinstance(prediction, str) else list(prediction)
    references = list(references)
    if rule == "vlmevalkit" and any(_is_not_finite(text) for text in [*given, *references]):
        return 0.0  # the reference stops
    if rule in ("due", "docowl"):  # DocOwl asks for upper case, which makes two letters of a sharp s
        given, references = [text.upper() for text in given], [text.upper() for text in references]
    meanings = canonical if rule == "official-canonical" and canonical else references
    if len(meanings) != len(references):
        raise DataError(
            f"wtq: {len(references)} references {references!r}, but {len(meanings)} canonical forms"
        )
    expected = [read_item(text, meaning) for text, meaning in zip(references, meanings, strict=True)]
    return float(_same(_distinct(map(read_item, given)), _distinct(expected)))


def read_item(text: str, canonical: str = "") -> Item:
    """Read one item; its meaning comes from the canonical form where there is one."""
    return Item(normalize(text), _meaning(canonical or text))


def normalize(text: str) -> str:
    """Bring an item into the form in which texts are compared.

    Accents go; citations, trailing brackets and enclosing quotes go as long as there are any; then one final
    period, and letter case.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(mark for mark in decomposed if unicodedata.category(mark) != "Mn").translate(_MARKS)
    while True:
        shorter = _CITATIONS.sub("", text.strip())
        shorter = _REMARKS.sub("", shorter.strip()).strip()
        quoted = _QUOTED.fullmatch(shorter)
        shorter = quoted[1] if quoted else shorter
        if shorter == text:
            break
        text = shorter
    return collapse(text.removesuffix(".")).lower()


def _meaning(text: str) -> Denotation:
    amount = _amount(text)
    return _Number(amount) if amount is not None else _date(text)


def _amount(text: str) -> float | None:
    try:
        amount = float(text)
    except ValueError:
        return None
    if not math.isfinite(amount):
        return None
    try:
        return int(text)  # exact, however large
    except ValueError:
        pass
    # Cut off, not rounded, as the originals do: 1.9999999 is stored as 1.
    return int(amount) if abs(amount - round(amount)) < _NEAR else amount


def _is_not_finite(text: str) -> bool:
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _date(text: str) -> Denotation:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    try:
        year = -1 if parts[0] in ("xx", "xxxx") else int(parts[0])
        month, day = (-1 if part == "xx" else int(part) for part in parts[1:])
    except ValueError:
        return None
    if (
        year == month == day == -1
        or not (month == -1 or 1 <= month <= 12)
        or not (day == -1 or 1 <= day <= 31)
    ):
        return None
    return _Number(year) if month == day == -1 else _Date(year, month, day)


def _matches(one: Item, other: Item) -> bool:
    if one.text == other.text:
        return True
    if isinstance(one.meaning, _Number) and isinstance(other.meaning, _Number):
        return abs(one.meaning.amount - other.meaning.amount) < _NEAR
    return isinstance(one.meaning, _Date) and one.meaning == other.meaning


def _distinct(items: Iterable[Item]) -> list[Item]:
    """Each value once: numbers by amount, dates by day, all else by normalised text."""
    found: dict[object, Item] = {}
    for item in items:
        found.setdefault(item.text if item.meaning is None else item.meaning, item)
    return list(found.values())


def _same(given: Sequence[Item], expected: Sequence[Item]) -> bool:
    return len(given) == len(expected) and all(
        any(_matches(item, other) for other in given) for item in expected
    )


def split_bars(text: str) -> list[str]:
    r"""Split an answer of TableVQA-Bench at `|`, and undo the escapes \n, \p and \\ of its items."""
    items = text.split("|")
    return [item.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\") for item in items]


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "due": lambda text: [text],
    "docowl": lambda text: [without_newlines(text)],
    "official": lambda text: text.split("\t"),
    "official-canonical": lambda text: text.split("\t"),
    # The prompt asks the model for `||`; in gold answers two bars have an empty item between them.
    "vlmevalkit": lambda text: split_bars(text.replace("||", "|")),
}


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    scores = [
        wtq(answer.prediction, answer.references, rule=rule, canonical=_canonical(answer, rule))
        for answer in answers
    ]
    return {"total": sum(scores), "count": len(scores)}


def _canonical(answer: Answer, rule: str) -> Sequence[str] | None:
    canonical = answer.meta.get("canonical")
    if rule != "official-canonical" or not canonical:
        return None
    if not (isinstance(canonical, list | tuple) and all(isinstance(text, str) for text in canonical)):
        raise DataError(
            f"wtq: {answer.key!r}: expected a list of texts in meta['canonical'], found {canonical!r:.60}"
        )
    return canonical


WTQ = Metric(
    name="wtq",
    rules=RULES,
    statistics=_statistics,
    figures=mean_figures("wtq"),
    needs={"official-canonical": "canonical"},
)
