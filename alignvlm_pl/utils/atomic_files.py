"""Files that are either whole or absent."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent; what is no text is written as in `printable`.

    Raises:
        ConfigError: Its folder cannot be made: there is a file of that name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path.parent} cannot be made a folder: a file is in its place") from error
    partial = path.with_name(path.name + ".partial")
    partial.write_text(printable(text), encoding="utf-8")
    os.replace(partial, path)


def printable(text: str) -> str:
    r"""Return a text that has an encoding: half a surrogate pair is written out, ``\ud83d``, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write prediction records as jsonl."""
    write_atomically(path, "".join(to_json(record, ensure_ascii=False) + "\n" for record in records))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json`."""
    write_atomically(path, to_json(results, indent=2) + "\n")


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return JSON as its standard has it: numbers that are none, such as nan, are null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
