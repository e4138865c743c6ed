"""Files of the sample log: one a rank, a line a micro batch, read by `replay` (no torch here).

    {"ledger":1,"after":0,"rank":0,"world":2,"stage":"read","device":"cpu","precision":"32-true","data":{…}}
    {"step":1,"micro":0,"rank":0,"keys":["a"],"positions":[17],"tiles":[2],"tokens":[61],"supervised":[5],…}

A process writes the first kind when it begins to train; it holds for the lines behind it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import DataError
from alignvlm_pl.utils.atomic_files import to_json

FOLDER = "ledger"  # Path below the run folder
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One micro batch of one rank.

    Attributes:
        head: First line of its process: `after` (the step it resumed from), `world` (world size), `stage`, `device`,
            `precision`, `data` (fingerprint of the training data, see datamodules/stream/state.py).
        line: `step`, `micro`, `rank`; by document `keys`, `positions`, `tiles`, `tokens`, `supervised`, `losses` (mean
            of a supervised token); `per_row`, the documents of each row of a packed batch; `loss`, the mean of a
            supervised token; `sources`, name -> that mean and the tokens.
    """

    head: Mapping[str, Any]
    line: Mapping[str, Any]


def rank_file(folder: Path, rank: int) -> Path:
    """Return the file of one rank."""
    return folder / f"rank{rank:05d}.jsonl"


def to_line(record: Mapping[str, Any]) -> str:
    """One line of a file, standard JSON: null for a loss that is not finite."""
    return to_json(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def short(value: float) -> float:
    """Round a number to nine digits, which are exact for float32."""
    return float(f"{value:.9g}")


def cut(path: Path, after: int) -> None:
    """Remove the lines after the step that a run resumes from, and half a line at the end."""
    end = 0
    with path.open("rb+") as stream:
        for raw in stream:
            line = _parse(raw)
            if line is None or line.get("step", line.get("after", after) + 1) > after:
                break
            end += len(raw)
        stream.truncate(end)


def read_step(folder: Path, step: int) -> list[Entry]:
    """Return the micro batches of a step, counted from 1, by rank and micro batch.

    Raises a DataError if the folder has no sample log, or no such step of all ranks.
    """
    paths = sorted(folder.glob("rank*.jsonl"))
    if not paths:
        raise DataError(f"there is no ledger in {folder}: training has not begun there, or an older version ran it")
    found = [entry for path in paths for entry in _of_step(path, step)]
    if not found:
        steps = [number for path in paths for number in _steps(path)]
        known = f"steps {min(steps)} to {max(steps)}" if steps else "no steps"
        raise DataError(f"ledger {folder}: there is no step {step}; it has {known}")
    _check_whole(found, step, folder)
    return sorted(found, key=lambda entry: (entry.line["rank"], entry.line["micro"]))


def _of_step(path: Path, step: int) -> Iterator[Entry]:
    # Lines begin with their step: the others need not be parsed.
    start, head = f'{{"step":{step},'.encode(), None
    with path.open("rb") as stream:
        for raw in stream:
            if raw.startswith(b'{"ledger"'):
                head = _parse(raw)
                if head is None or head["ledger"] != VERSION:
                    raise DataError(f"ledger {path}: expected version {VERSION}, found {raw[:40]!r}")
            elif raw.startswith(start) and (line := _parse(raw)) is not None:
                if head is None:
                    raise DataError(f"ledger {path} is damaged: step {step} stands before any head")
                yield Entry(head=head, line=line)


def _steps(path: Path) -> Iterator[int]:
    with path.open("rb") as stream:
        for raw in stream:
            if raw.startswith(b'{"step":'):
                yield int(raw[8:30].split(b",")[0])


def _check_whole(entries: Sequence[Entry], step: int, folder: Path) -> None:
    micros = dict.fromkeys(range(entries[0].head["world"]), 0)
    for entry in entries:
        micros[entry.line["rank"]] = micros.get(entry.line["rank"], 0) + 1
    short_of = [rank for rank, count in micros.items() if count < max(micros.values())]
    if short_of:
        raise DataError(
            f"ledger {folder}: step {step} is not whole, ranks {short_of} have fewer than {max(micros.values())} micro "
            "batches; the run was killed in it, or the files of some ranks lie elsewhere"
        )


def _parse(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
