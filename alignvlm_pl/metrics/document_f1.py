"""Corpus F1 over the fields of documents: DeepForm and KLC.

References: DocOwl1.5 (mPLUG-DocOwl f91a7685). `due` = `due_evaluator/scorers/fscorer.py` with letter case ignored, as
DocOwl calls it, on the answers as they are; `due-case-sensitive` = its default; `docowl` = the whole of
`due_benchmarks_eval.py`, which cleans the answers first. DocOwl pairs documents by position, here by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignvlm_pl.errors import DataError

from .base import Answer, Metric, Statistics, check_rule, f1_score, share
from .text import without_newlines

RULES = ("docowl", "due", "due-case-sensitive")
DEEPFORM_FIELDS = ("advertiser", "flight_from", "flight_to", "gross_amount", "contract_num")
KLC_FIELDS = (
    "address__post_town",
    "address__postcode",
    "address__street_line",
    "charity_name",
    "charity_number",
    "income_annually_in_british_pounds",
    "report_date",
    "spending_annually_in_british_pounds",
)
MISSING = "None"
"""The answer that a document lacks the field; DocOwl scores it as no answer."""

Annotation = Sequence[Mapping[str, Any]]
"""``[{"key": field, "values": [{"value": text, "value_variants": [text, …]}]}]``, variants optional."""

_COUNTS = ("correct", "predicted", "found", "gold")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Value:
    text: str
    variants: frozenset[str]

    def matches(self, other: "_Value") -> bool:
        return self.text == other.text or self.text in other.variants or other.text in self.variants


def count_fields(predicted: Annotation, gold: Annotation, *, ignore_case: bool = True) -> dict[str, float]:
    """Count the values of one document.

    Two values match when they are equal, or when either is a variant of the other. The predictions in turn each
    take away the first gold value that matches, and for recall the gold values take away predictions; because of
    the variants the two may differ.

    Args:
        predicted: Values that were found.
        gold: Values that are there.
        ignore_case: Compare the values in upper case; names of fields are compared as they are.

    Returns:
        For each field ``correct/<field>`` of ``predicted/<field>``, and ``found/<field>`` of ``gold/<field>``.
    """
    ours, theirs = _values(predicted, ignore_case), _values(gold, ignore_case)
    counts: dict[str, float] = {}
    for field in {**theirs, **ours}:
        guesses, truths = ours.get(field, []), theirs.get(field, [])
        figures = (_taken(guesses, truths), len(guesses), _taken(truths, guesses), len(truths))
        counts |= {f"{name}/{field}": float(value) for name, value in zip(_COUNTS, figures, strict=True)}
    return counts


def _values(annotation: Annotation, ignore_case: bool) -> dict[str, list[_Value]]:
    form = str.upper if ignore_case else str
    fields: dict[str, list[_Value]] = {}
    for entry in annotation:
        for value in entry["values"]:
            variants = frozenset(form(variant) for variant in value.get("value_variants") or ())
            fields.setdefault(entry["key"], []).append(_Value(text=form(value["value"]), variants=variants))
    return fields


def _taken(takers: Iterable[_Value], pool: Iterable[_Value]) -> int:
    """How many find one to take away, each the first that matches."""
    left = list(pool)
    taken = 0
    for taker in takers:
        match = next((place for place, value in enumerate(left) if taker.matches(value)), None)
        if match is not None:
            del left[match]
            taken += 1
    return taken


def annotate(
    answers: Iterable[tuple[str, str]], fields: Sequence[str], *, rule: str = "docowl"
) -> list[dict[str, Any]]:
    """Make an annotation of the raw answers about one document.

    Args:
        answers: Question and answer. The field is the first that is named in the question.
        fields: Fields of the benchmark, in its order.
        rule: Under `docowl` line ends and outer white space are deleted and the answer None is dropped; any other
            answer counts, the empty one too.

    Raises:
        ConfigError: There is no such rule.
        DataError: A question names no field.
    """
    check_rule("document_f1", rule, RULES)
    annotation = []
    for question, answer in answers:
        field = next((name for name in fields if name in question), None)
        if field is None:
            raise DataError(
                f"document_f1: question {question!r} names none of the fields {', '.join(fields)}"
            )
        value = without_newlines(answer) if rule == "docowl" else answer
        if rule != "docowl" or value != MISSING:
            annotation.append({"key": field, "values": [{"value": value}]})
    return annotation


def _statistics(answers: Sequence[Answer], rule: str) -> Statistics:
    key, meta = answers[0].key, answers[0].meta
    if "document" not in meta:
        raise DataError(f"document_f1: {key!r} names no document; expected a text in meta['document']")
    gold = meta.get("gold")
    if gold is None:
        raise DataError(f"document_f1: {key!r} has no annotation; expected a list in meta['gold']")
    if any(answer.meta.get("gold") != gold for answer in answers):
        raise DataError(f"document_f1: rows of document {meta['document']!r} have different annotations")
    if not _is_annotation(gold):
        raise DataError(
            f"document_f1: {key!r}: expected key and values, all texts, in meta['gold'], found {gold!r:.80}"
        )
    # The reference finds the field in the question of DUE's metadata, which the one that was asked may differ from.
    pairs = [(answer.meta.get("field", answer.question), answer.prediction) for answer in answers]
    predicted = annotate(pairs, DEEPFORM_FIELDS + KLC_FIELDS, rule=rule)
    return count_fields(predicted, gold, ignore_case=rule != "due-case-sensitive")


def _is_annotation(gold: Any) -> bool:
    """Whether all that is compared is text; other things are equal to it under some rules only."""
    values = [value for entry in gold for value in entry["values"]]
    texts = [entry["key"] for entry in gold] + [value["value"] for value in values]
    variants = [text for value in values for text in value.get("value_variants") or ()]
    return all(isinstance(text, str) for text in texts + variants)


def _figures(sums: Statistics) -> dict[str, float]:
    """F1, precision and recall of the corpus; F1 of each field that is in the gold."""
    totals = dict.fromkeys(_COUNTS, 0.0)
    for name, value in sums.items():
        totals[name.split("/", 1)[0]] += value
    figures = dict(zip(("f1", "precision", "recall"), _scores(totals, ""), strict=True))
    fields = [
        name.removeprefix("gold/") for name, count in sums.items() if name.startswith("gold/") and count
    ]
    return figures | {f"f1/{field}": _scores(sums, f"/{field}")[0] for field in sorted(fields)}


def _scores(sums: Statistics, ending: str) -> tuple[float, float, float]:
    correct, predicted, found, gold = (sums.get(name + ending, 0.0) for name in _COUNTS)
    precision, recall = share(correct, predicted), share(found, gold)
    return f1_score(precision, recall), precision, recall


def _document(answer: Answer) -> str:
    return str(answer.meta.get("document", answer.key))


DOCUMENT_F1 = Metric(
    name="document_f1", rules=RULES, statistics=_statistics, figures=_figures, unit=_document
)
