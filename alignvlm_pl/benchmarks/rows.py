"""A row of a VLMEvalKit table, of its benchmark files or its results, as question, references and meta."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from alignvlm_pl.metrics.vlmevalkit_tables import MISSING, read_references

from .base import Benchmark

_KEPT = ("split", "category", "l2-category", "hint", "image_source")


def read_row(row: Mapping[str, str], benchmark: Benchmark) -> tuple[str, list[str], dict[str, Any]]:
    """Read a row: column name -> text; columns that a row leaves empty count as not there.

    Args:
        row: One row of the table; other columns than the known ones are passed over.
        benchmark: Decides how its answer column is read.

    Returns:
        The question, its accepted answers, empty where the row has none, and the ``meta`` of the sample: ``index``,
        ``choices`` (letter -> text) and the columns ``split``, ``category``, ``l2-category``, ``hint``,
        ``image_source``.
    """
    meta: dict[str, Any] = {name: row[name] for name in _KEPT if row.get(name)}
    if row.get("index"):
        meta["index"] = row["index"]
    # An option called None or NA does not exist for VLMEvalKit: pandas reads it as an empty cell.
    choices = {letter: row[letter] for letter in ascii_uppercase if row.get(letter, "") not in MISSING}
    if choices:
        meta["choices"] = choices
    answer = row.get("answer") or ""
    references = read_references(answer) if benchmark.list_answers else (answer,)
    return row.get("question") or "", [reference for reference in references if answer], meta
