"""Predictions on disk as they are made, so that a killed evaluation is resumed."""

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..utils.atomic_files import write_atomically
from .records import Record

log = logging.getLogger(__name__)
Identity = dict[str, Any]


class Journal:
    """The predictions of one benchmark while it is evaluated: one file a rank, one line a prediction.

    The ranks may share the folder or not. The identity, JSON values that the predictions depend on (weights, dataset,
    settings), is the first line of each file; predictions of another identity are discarded.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        # JSON makes lists of tuples.
        self.identity: Identity = json.loads(json.dumps(identity))
        self._stream: IO[str] | None = None

    def read(self) -> dict[int, Record]:
        """Return the records on disk by the position of their sample; to be called on rank 0 before any rank writes."""
        found: dict[int, Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = _complete_lines(path)
            if not lines or lines[0] != self.identity:
                log.warning("%s holds predictions of other weights or settings; they are discarded", path)
                path.unlink()
                continue
            found |= {line["position"]: line["record"] for line in lines[1:]}
        return found

    def open(self, rank: int) -> None:
        """Begin to write, after the lines of a killed run of the same rank."""
        path = self.folder / f"rank{rank}.jsonl"
        complete = _complete_lines(path) if path.is_file() else []
        lines = complete if complete and complete[0] == self.identity else [self.identity]
        # Written again, because the last line of a killed run may be cut.
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, positions: Sequence[int], records: Sequence[Record]) -> None:
        """Write the records of one batch."""
        assert self._stream is not None, "open() has not run"
        for position, record in zip(positions, records, strict=True):
            self._stream.write(json.dumps({"position": position, "record": record}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Stop writing; the files stay."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def remove(self) -> None:
        """Delete the files: the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty until the last benchmark
            self.folder.parent.rmdir()


def weights_identity(path: str | Path | None) -> Any:
    """Identify a checkpoint or folder of weights by files, sizes and times of change; others by name."""
    if path is None or not Path(path).exists():
        return None if path is None else str(path)
    given = Path(path).resolve()
    files = sorted(file for file in given.rglob("*") if file.is_file()) if given.is_dir() else [given]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _complete_lines(path: Path) -> list[Any]:
    """Parse the lines of a file up to the first that is cut."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
        if not text.endswith("\n"):
            lines.pop()
    return lines
