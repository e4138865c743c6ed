"""Result files of a study: one JSON file a cell, all that a report needs, small enough to be kept in git."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import DataError
from ..scoring.records import file_name
from ..utils.atomic_files import write_atomically
from .plan import Cell

Result = dict[str, Any]
"""Keys: `cell` (id), `arm`, `seed`, `budget`, `rate`, `steps` of each stage, `seconds` and `flops` of training, `loss`
(dataset -> nats a supervised token), `order` (stage/step -> digest of its samples so far), `questions` (dataset ->
columns `keys`, `documents` and each metric's values), `made` (commit, versions, machine) and `measures` (name ->
settings, and what was found)."""


class Results:
    """The folder of a study's result files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[Path, tuple[int, Any]] = {}  # time of its last change, and content

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.id}.json"

    def read(self, cell: Cell) -> Result | None:
        """Return the result of a cell, or None; raise a DataError for a file that is damaged or of another cell."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            changed = path.stat().st_mtime_ns
            if path not in self._read or self._read[path][0] != changed:
                self._read[path] = changed, json.loads(path.read_text("utf-8"))
            result = self._read[path][1]
            found = {key: result[key] for key in ("cell", "seed")}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no result of a study ({error!r:.60}); remove it, the cell then runs again"
            ) from error
        expected = {"cell": cell.id, "seed": cell.seed}
        if found != expected:
            raise DataError(f"{path} is of {found}, expected {expected}: remove it, or give another --results")
        return {**result, "arm": cell.arm}  # a cell that two studies share may have two names

    def read_other(self, name: str) -> Any:
        """Return what `write_other` has kept under a name, or None."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def write_other(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep something that is of no cell."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{name}.json", to_text(content) + "\n")

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


def tested_questions(folder: Path, documents: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, list[Any]]]:
    """Return dataset -> columns of the predictions in a run folder of `test`: keys, documents, scores of each metric.

    `documents` has dataset -> key -> name of the document that a question is about.
    """
    found = {}
    for name, names in documents.items():
        path = folder / "predictions" / f"{file_name(name)}.jsonl"
        if path.is_file():
            scores = _scores(path)
            found[name] = {"keys": scores["keys"], "documents": [names[key] for key in scores["keys"]], **scores}
    return found


def scores_alone(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return file of a dataset -> the scores in a run folder of `test`, of questions that are known already."""
    found = {path.stem: _scores(path) for path in sorted((folder / "predictions").glob("*.jsonl"))}
    return {unquote(name): {key: one[key] for key in one if key != "keys"} for name, one in found.items()}


def _scores(path: Path) -> dict[str, list[Any]]:
    """Return the keys of a file of predictions, in their order, and the scores of each metric that all have."""
    records = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    records = sorted((one for one in records if not one.get("error")), key=lambda one: one["key"])
    names = [name for name, value in records[0].items() if isinstance(value, float)] if records else []
    shared = [name for name in names if all(name in one for one in records)]
    return {"keys": [one["key"] for one in records], **{name: [one[name] for one in records] for name in shared}}


def check_order(results: Iterable[Result]) -> None:
    """Raise a DataError where a stage of one name was trained with one seed on other samples, or in another order."""
    seen: dict[tuple[int, str], tuple[str, str]] = {}
    for result in results:
        for step, digest in result["order"].items():
            arm, before = seen.setdefault((result["seed"], step), (result["arm"], digest))
            if digest != before:
                raise DataError(
                    f"arms {arm} and {result['arm']}, seed {result['seed']}: up to {step} they had other "
                    "samples, so they cannot be compared; train both from the same data files and options"
                )
