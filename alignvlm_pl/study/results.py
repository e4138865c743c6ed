"""Result files of a study: one JSON file a cell, all that a report needs, small enough to be kept in git."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..utils.atomic_files import write_atomically
from .plan import Cell

Result = dict[str, Any]
"""Keys: `cell` (id), `arm`, `seed`, `budget`, `rate`, `steps`, `seconds` and `flops` of training, `loss` (dataset ->
nats a supervised token), `order` (step -> digest of the samples so far), `questions` (dataset -> columns `keys`,
`documents` and each metric's values), `made` (commit, versions, machine) and `measures` (name -> what it found)."""


class Results:
    """The folder of a study's result files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.id}.json"

    def read(self, cell: Cell) -> Result | None:
        """Return the result of a cell, or None; raise a DataError for a file that is damaged or of another cell."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text("utf-8"))
            found = {key: result[key] for key in ("cell", "arm", "seed")}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no result of a study ({error!r:.60}); remove it, the cell then runs again"
            ) from error
        expected = {"cell": cell.id, "arm": cell.arm, "seed": cell.seed}
        if found != expected:
            raise DataError(f"{path} is of {found}, expected {expected}: remove it, or give another --results")
        return result

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Write a result, whole or not at all; a list of numbers or names is one line."""
        head = {"cell": cell.id, "arm": cell.arm, "seed": cell.seed, "budget": cell.budget, "rate": cell.rate}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(cell), to_text({**head, **result}) + "\n")


def to_text(value: Any, indent: str = "") -> str:
    """Return JSON with one key a line, and lists in one line each."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(_rounded(value), ensure_ascii=False)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(str(key))}: {to_text(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def columns_of(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a file of predictions: keys, documents, and the scores of each metric that all have."""
    records = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    records = sorted((one for one in records if not one.get("error")), key=lambda one: one["key"])
    names = [name for name, value in records[0].items() if isinstance(value, float)] if records else []
    documents = [str(one.get("meta", {}).get("document", one["key"])) for one in records]
    return {
        "keys": [one["key"] for one in records],
        "documents": documents,
        **{name: [one[name] for one in records] for name in names if all(name in one for one in records)},
    }


def tested_questions(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return dataset -> columns of the predictions in a run folder of `test`."""
    return {path.stem: columns_of(path) for path in sorted((folder / "predictions").glob("*.jsonl"))}


def check_order(results: Iterable[Result]) -> None:
    """Raise a DataError where two results with one seed were trained on other samples, or in another order."""
    seen: dict[tuple[int, str], tuple[str, str]] = {}
    for result in results:
        for step, digest in result["order"].items():
            arm, before = seen.setdefault((result["seed"], step), (result["arm"], digest))
            if digest != before:
                raise DataError(
                    f"arms {arm} and {result['arm']}, seed {result['seed']}: their first {step} steps had other "
                    "samples, so they cannot be compared; train both from the same data files and options"
                )
