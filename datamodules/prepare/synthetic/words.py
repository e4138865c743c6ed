"""Words of `words.yaml`: phrasings of questions, and usual words of whole pages, such as labels and closing lines.

Pages of both splits show the usual words. The amounts of a receipt differ by their labels only, so a held-out receipt
without TOTAL, SUBTOTAL or CASH would ask for what it does not show, and could not measure what a model has learned.
A label is no answer, so nothing leaks: names and values, which are the answers, obey `lexicon.belongs` here too.
"""

from pathlib import Path

import yaml

from .lexicon import prints

_WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text("utf-8"))
LABELS: dict[str, list[str]] = _WORDS["labels"]
SUMMARY_HEADS: list[list[str]] = _WORDS["summary_heads"]
COLUMNS: dict[str, list[str]] = _WORDS["columns"]
PLACES: list[str] = _WORDS["places"]
QUESTIONS: dict[str, list[str]] = _WORDS["questions"]
RECEIPT_QUESTIONS: dict[str, list[str]] = _WORDS["receipt_questions"]
TAXES = ("GST", "GST", "GST", "SST", "VAT", "Tax")
RATES = (6, 6, 6, 5, 7, 8, 9, 10)
CURRENCIES = ("RM", "RM", "MYR", "$", "SGD", "EUR", "USD", "GBP")
MONTHS = "January February March April May June July August September October November December".split()
# What a month's name and a day are made of; a date is kept apart by its letters and digits all together.
_DATE_PARTS = [*MONTHS, *(month[:3] for month in MONTHS), *(f"{day:02d}" for day in range(1, 32))]
_YEARS = [str(year) for year in range(1990, 2040)]
SMALL_AMOUNTS = ("0.00", "0.01", "0.02", "0.03", "0.04", "-0.01", "-0.02", "-0.03", "-0.04")
"""Roundings, and the change of who pays the exact sum: no answers, but what most receipts show."""


def _usual() -> frozenset[str]:
    groups = [*LABELS.values(), *SUMMARY_HEADS, *COLUMNS.values(), [*_DATE_PARTS, *_YEARS]]
    found = {print_ for group in groups for label in group for print_ in _label_prints(label)}
    signs = [currency + amount for currency in ("", *CURRENCIES) for amount in SMALL_AMOUNTS]
    return frozenset(found.union(*map(prints, (*signs, *CURRENCIES, *TAXES, "10%", "@10%", "(10%)"))))


def _label_prints(label: str) -> set[str]:
    filled = [label.format(tax=tax, rate=10, currency=currency) for tax in TAXES for currency in CURRENCIES]
    return {print_ for text in filled for print_ in prints(text)}


USUAL = _usual()
"""`lexicon.prints` of all of these."""
