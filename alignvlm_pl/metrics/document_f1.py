"""F1 over the fields of documents: DeepForm and KLC.

References: DocOwl1.5 (mPLUG-DocOwl f91a7685). `due` = `due_evaluator/scorers/fscorer.py` with letter case ignored, as
DocOwl calls it, on unchanged predictions; `due-case-sensitive` = its default; `docowl` = all of
`due_benchmarks_eval.py`, which normalises predictions first. DocOwl pairs documents by position, here by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignvlm_pl.errors import DataError

from .base import EvalSample, Metric, Statistics, check_rule, f1_score, share
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
"""Prediction for a field that the document does not have; DocOwl drops it."""

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
    """Count the matching values of one document.

    Two values match if they are equal or one is a variant of the other. For precision each prediction is matched to the
    first free gold value, for recall each gold value to the first free prediction; with variants the counts may differ.

    Returns:
        Per field ``correct/<field>`` of ``predicted/<field>``, and ``found/<field>`` of ``gold/<field>``.
    """
    predicted_values, gold_values = _values(predicted, ignore_case), _values(gold, ignore_case)
    counts: dict[str, float] = {}
    for field in {**gold_values, **predicted_values}:
        predictions, references = predicted_values.get(field, []), gold_values.get(field, [])
        correct, found = _count_matches(predictions, references), _count_matches(references, predictions)
        numbers = (correct, len(predictions), found, len(references))
        counts |= {f"{name}/{field}": float(number) for name, number in zip(_COUNTS, numbers, strict=True)}
    return counts


def _values(annotation: Annotation, ignore_case: bool) -> dict[str, list[_Value]]:
    form = str.upper if ignore_case else str
    fields: dict[str, list[_Value]] = {}
    for entry in annotation:
        for value in entry["values"]:
            variants = frozenset(form(variant) for variant in value.get("value_variants") or ())
            fields.setdefault(entry["key"], []).append(_Value(text=form(value["value"]), variants=variants))
    return fields


def _count_matches(values: Iterable[_Value], candidates: Iterable[_Value]) -> int:
    """Count the values that match a candidate; each uses up the first candidate that matches."""
    free = list(candidates)
    before = len(free)
    for value in values:
        match = next((index for index, candidate in enumerate(free) if value.matches(candidate)), None)
        if match is not None:
            del free[match]
    return before - len(free)


def annotate(
    predictions: Iterable[tuple[str, str]], fields: Sequence[str], *, rule: str = "docowl"
) -> list[dict[str, Any]]:
    """Build the annotation of one document from its predictions.

    Of the (question, prediction) pairs the field is the first of `fields` that the question names. Under `docowl` line
    breaks and outer white space are removed, and the prediction None is dropped; any other counts, even an empty one.

    Raises:
        DataError: A question names no field.
    """
    check_rule("document_f1", rule, RULES)
    annotation = []
    for question, prediction in predictions:
        field = next((name for name in fields if name in question), None)
        if field is None:
            raise DataError(f"document_f1: question {question!r} names none of the fields {', '.join(fields)}")
        value = without_newlines(prediction) if rule == "docowl" else prediction
        if rule != "docowl" or value != MISSING:
            annotation.append({"key": field, "values": [{"value": value}]})
    return annotation


def _statistics(samples: Sequence[EvalSample], rule: str) -> Statistics:
    key, meta = samples[0].key, samples[0].meta
    if "document" not in meta:
        raise DataError(f"document_f1: {key!r} names no document; expected a text in meta['document']")
    gold = meta.get("gold")
    if gold is None:
        raise DataError(f"document_f1: {key!r} has no annotation; expected a list in meta['gold']")
    if any(sample.meta.get("gold") != gold for sample in samples):
        raise DataError(f"document_f1: rows of document {meta['document']!r} have different annotations")
    if not _is_annotation(gold):
        raise DataError(
            f"document_f1: {key!r}: expected key and values, all texts, in meta['gold'], found {gold!r:.80}"
        )
    # The reference implementation reads the field from the question in DUE's metadata, which may differ from ours.
    pairs = [(sample.meta.get("field", sample.question), sample.prediction) for sample in samples]
    predicted = annotate(pairs, DEEPFORM_FIELDS + KLC_FIELDS, rule=rule)
    return count_fields(predicted, gold, ignore_case=rule != "due-case-sensitive")


def _is_annotation(gold: Any) -> bool:
    values = [value for entry in gold for value in entry["values"]]
    texts = [entry["key"] for entry in gold] + [value["value"] for value in values]
    variants = [text for value in values for text in value.get("value_variants") or ()]
    return all(isinstance(text, str) for text in texts + variants)


def _scores(sums: Statistics) -> dict[str, float]:
    totals = dict.fromkeys(_COUNTS, 0.0)
    for name, value in sums.items():
        totals[name.split("/", 1)[0]] += value
    scores = dict(zip(("f1", "precision", "recall"), _f1(totals, ""), strict=True))
    fields = [name.removeprefix("gold/") for name, count in sums.items() if name.startswith("gold/") and count]
    return scores | {f"f1/{field}": _f1(sums, f"/{field}")[0] for field in sorted(fields)}


def _f1(sums: Statistics, ending: str) -> tuple[float, float, float]:
    correct, predicted, found, gold = (sums.get(name + ending, 0.0) for name in _COUNTS)
    precision, recall = share(correct, predicted), share(found, gold)
    return f1_score(precision, recall), precision, recall


DOCUMENT_F1 = Metric(
    name="document_f1",
    rules=RULES,
    statistics=_statistics,
    scores=_scores,
    unit=lambda sample: str(sample.meta.get("document", sample.key)),
)
