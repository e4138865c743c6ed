"""WikiTableQuestions: denotation accuracy of lists of items.

References: `due` = `due_evaluator/scorers/wtq_scorer.py` as DocOwl1.5 (mPLUG-DocOwl f91a7685) calls it, with
letter case ignored; `docowl` = the same after DocOwl's normalisation; `official` = `evaluator.py` 1.0.2 of
ppasupat/WikiTableQuestions 7d455a5a, `official-canonical` = the same with the canonical values of the dataset;
`vlmevalkit` = the copy inside its TableVQA-Bench (e8e78f05).
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from alignvlm_pl.errors import DataError

from .base import EvalSample, Metric, check_rule, mean_metric
from .text import collapse, without_newlines

RULES = ("due", "docowl", "official", "official-canonical", "vlmevalkit")

_NEAR = 1e-6  # tolerance for equal numbers
_QUOTES = {ord(mark): "'" for mark in "‘’´`"} | {ord(mark): '"' for mark in "“”"}
_DASHES = {ord(mark): "-" for mark in "‐‑‒–—−"}
_MARKS = _QUOTES | _DASHES
_CITATION = r"(?!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+]"  # brackets that are not leading, a number in brackets, a mark
_CITATIONS = re.compile(rf"(?:{_CITATION})+$")
_REMARKS = re.compile(r"(?: \([^)]*\))+$")
_QUOTED = re.compile(r'"([^"]*)"')


Denotation = int | float | tuple[int, int, int] | None
"""Typed value of an item: a number, or year, month and day, -1 where unknown; None: only its text."""


class Item(NamedTuple):
    """One item of a list: its normalised text and its typed value."""

    text: str
    value: Denotation


def wtq(
    prediction: str | Sequence[str],
    references: Sequence[str],
    *,
    rule: str = "due",
    canonical: Sequence[str] | None = None,
) -> float:
    """Return 1 if both lists denote the same set of values, else 0.

    Repeated values count once. Items are equal if their normalised texts are equal, both are numbers (as Python parses
    them: not `1,000`) within 1e-6, or both are the same date.

    A text as prediction is one item under `due` and `docowl`; it is split at tabs (`official`) or at `|`
    (`vlmevalkit`). `official-canonical` takes the canonical forms of the references; without, it is as `official`.

    Raises:
        DataError: The numbers of canonical forms and references differ.
    """
    check_rule("wtq", rule, RULES)
    predicted = _SPLIT[rule](prediction) if isinstance(prediction, str) else list(prediction)
    references = list(references)
    if rule == "vlmevalkit" and not all(math.isfinite(_float(text) or 0.0) for text in [*predicted, *references]):
        return 0.0  # the reference implementation raises
    if rule in ("due", "docowl"):  # upper case as in DocOwl: ß becomes SS
        predicted, references = [text.upper() for text in predicted], [text.upper() for text in references]
    values = canonical if rule == "official-canonical" and canonical else references
    if len(values) != len(references):
        raise DataError(f"wtq: {len(references)} references {references!r}, but {len(values)} canonical forms")
    expected = [read_item(text, value) for text, value in zip(references, values, strict=True)]
    found, wanted = _distinct(map(read_item, predicted)), _distinct(expected)
    return float(len(found) == len(wanted) and all(any(_matches(item, one) for one in found) for item in wanted))


def read_item(text: str, canonical: str = "") -> Item:
    """Parse one item; its value is that of the canonical form if there is one."""
    amount = _amount(canonical or text)
    return Item(normalise_item(text), _date(canonical or text) if amount is None else amount)


def normalise_item(text: str) -> str:
    """Normalise the text of an item for comparison.

    Removes accents; repeatedly citations, trailing brackets and enclosing quotes; then one final period, and case.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(mark for mark in decomposed if unicodedata.category(mark) != "Mn").translate(_MARKS)
    before = None
    while text != before:
        before = text
        text = _REMARKS.sub("", _CITATIONS.sub("", text.strip()).strip()).strip()
        quoted = _QUOTED.fullmatch(text)
        text = quoted[1] if quoted else text
    return collapse(text.removesuffix(".")).lower()


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _amount(text: str) -> float | None:
    amount = _float(text)
    if amount is None or not math.isfinite(amount):
        return None
    try:
        return int(text)  # exact, however large
    except ValueError:
        pass
    # Truncated, not rounded, as in the reference implementations: 1.9999999 becomes 1.
    return int(amount) if abs(amount - round(amount)) < _NEAR else amount


def _date(text: str) -> Denotation:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    try:
        year = -1 if parts[0] in ("xx", "xxxx") else int(parts[0])
        month, day = (-1 if part == "xx" else int(part) for part in parts[1:])
    except ValueError:
        return None
    if year == month == day == -1 or not (month == -1 or 1 <= month <= 12) or not (day == -1 or 1 <= day <= 31):
        return None
    return year if month == day == -1 else (year, month, day)


def _matches(one: Item, other: Item) -> bool:
    if one.text == other.text:
        return True
    if isinstance(one.value, int | float) and isinstance(other.value, int | float):
        return abs(one.value - other.value) < _NEAR
    return isinstance(one.value, tuple) and one.value == other.value


def _distinct(items: Iterable[Item]) -> list[Item]:
    """Return each value once: numbers by amount, dates by day, all others by normalised text."""
    found: dict[object, Item] = {}
    for item in items:
        found.setdefault(item.text if item.value is None else item.value, item)
    return list(found.values())


def split_bars(text: str) -> list[str]:
    r"""Split a text of TableVQA-Bench at `|`, and unescape \n, \p and \\ in its items."""
    items = text.split("|")
    return [item.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\") for item in items]


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "due": lambda text: [text],
    "docowl": lambda text: [without_newlines(text)],
    "official": lambda text: text.split("\t"),
    "official-canonical": lambda text: text.split("\t"),
    # The prompt requests `||`; in references two bars have an empty item between them.
    "vlmevalkit": lambda text: split_bars(text.replace("||", "|")),
}


def _canonical(sample: EvalSample, rule: str) -> dict[str, Any]:
    canonical = sample.meta.get("canonical")
    if rule != "official-canonical" or not canonical:
        return {}
    if not (isinstance(canonical, list | tuple) and all(isinstance(text, str) for text in canonical)):
        raise DataError(f"wtq: {sample.key!r}: expected a list of texts in meta['canonical'], found {canonical!r:.60}")
    return {"canonical": canonical}


WTQ: Metric = mean_metric("wtq", wtq, RULES, options=_canonical, needs={"official-canonical": "canonical"})
