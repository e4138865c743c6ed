"""Rows of VLMEvalKit tables (benchmark files and results) as question, references and meta."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from alignvlm_pl.metrics.base import has_text
from alignvlm_pl.metrics.vlmevalkit_tables import MISSING, read_references

from .base import Benchmark

_KEPT = ("split", "category", "l2-category", "hint", "image_source")


def read_row(row: Mapping[str, str], benchmark: Benchmark) -> tuple[str, list[str], dict[str, Any]]:
    """Parse a row, column name -> text; empty columns count as missing, unknown ones are ignored.

    Returns:
        The question; its references, empty if all are blank; and the ``meta`` of the sample: ``index``, ``choices``
        (letter -> text) and the columns ``split``, ``category``, ``l2-category``, ``hint``, ``image_source``.
    """
    meta: dict[str, Any] = {name: row[name] for name in _KEPT if row.get(name)}
    if row.get("index"):
        meta["index"] = row["index"]
    # VLMEvalKit loses an option called None or NA: pandas parses it as an empty cell.
    choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter, "") not in MISSING}
    if choices:
        meta["choices"] = choices
    references = _references(row, benchmark)
    return row.get("question") or "", list(references) if has_text(references) else [], meta


def _references(row: Mapping[str, str], benchmark: Benchmark) -> tuple[str, ...]:
    answer = row.get("answer") or ""
    return read_references(answer) if benchmark.list_answers else (answer,)


def answer_problem(row: Mapping[str, str], benchmark: Benchmark) -> str:
    """Return what is invalid about the letter in the ``answer`` of a multiple-choice question; empty if it is valid.

    A question without options is an open one. An option called None counts, though `read_row` loses it.
    """
    letters = [letter for letter in ascii_uppercase if row.get(letter)]
    found = _references(row, benchmark)
    if not letters or not has_text(found) or set(found) <= set(letters):
        return ""
    if all(scoring.metric != "multiple_choice" for scoring in benchmark.scorings):
        return ""
    return f"the answer {row['answer']!r:.40} is none of the options {', '.join(letters)}"
