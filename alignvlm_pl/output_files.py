"""Files that are either whole or absent."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write prediction records as jsonl."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`."""
    write_atomically(path, to_json(results, indent=2) + "\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON as its standard has it: numbers that are none, such as nan, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
