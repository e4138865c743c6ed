"""Records of what was read, a record for each page and question: as JSON lines, CSV or Markdown; and their journal.

Loads no torch.
"""

import csv
import fcntl
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import ConfigError, DataError
from ..utils.atomic_files import atomic_path, printable, to_json
from ..utils.text_files import read_head

COLUMNS = ("source", "page", "field", "question", "answer", "tokens", "seconds", "finish_reason", "model", "error")
KINDS = ("jsonl", "csv", "md")
JOURNAL = ".part"
"""Suffix of the file with the records of a command that has not ended."""
Record = dict[str, Any]
Key = tuple[Any, ...]
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def record_of(source: Path, page: int | None = None, **values: Any) -> Record:
    """Return a record with all `COLUMNS`: None where there is no value."""
    return {**dict.fromkeys(COLUMNS), "source": printable(str(source)), "page": page, **values}


def record_key(record: Mapping[str, Any]) -> Key:
    """Return by what a record is found again: file, page and question."""
    return tuple(record[name] for name in ("source", "page", "field", "question"))


def record_writer(file: IO[str], kind: str) -> Callable[[Record], Any]:
    """Return what writes a record to an open file in the form `jsonl`, `csv` or `md`; a CSV begins with its columns.

    In Markdown each page has a heading; an answer of several lines is a block of code, so that nothing in it is markup.
    """
    if kind == "jsonl":
        return lambda record: file.write(_line(record))
    if kind == "csv":
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        return lambda record: table.writerow({k: printable(v) if isinstance(v, str) else v for k, v in record.items()})
    last: list[Any] = []

    def write(record: Record) -> None:
        heading = [record["source"], record["page"]]
        if heading != last:
            last[:] = heading
            page = "" if record["page"] is None else f", page {record['page']}"
            file.write(f"## {_escaped(record['source'])}{page}\n\n")
        file.write(printable(_markdown(record)))

    return write


class Journal(AbstractContextManager["Journal"]):
    """The records of a command while it reads, in `OUT.part`: a line for each, so that a killed command is resumed.

    The first line has the settings that the records depend on. `with` opens it, drops a last line that is cut, and
    keeps other commands away.

    Args:
        out: The file that `finish` writes.
        settings: JSON values, by the names that a message gives them.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.path = out, out.with_name(out.name + JOURNAL)
        self.done: set[Key] = set()
        self._settings: Record = json.loads(json.dumps(settings))

    def __enter__(self) -> "Journal":
        """Open it.

        Raises:
            ConfigError: Another command writes it, it has records of other settings, or `out` cannot be a file.
        """
        if self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a folder; give the name of a file")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"{self.out.parent} cannot be made a folder: a file is in its place") from error
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._take_up()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, records: Iterable[Record]) -> None:
        """Write records; they are in the file when this returns."""
        self._file.write("".join(map(_line, records)).encode())
        self._file.flush()

    def finish(self, failures: Iterable[Record], kind: str) -> None:
        """Write all records and then those of failures to `out`, in the form `kind`, and remove the journal."""
        with atomic_path(self.out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            write = record_writer(file, kind)
            lines = (record for number, (record, _) in enumerate(self._lines()) if number)
            for record in chain(lines, failures):
                write(record)
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another command is writing into {self.path}; wait for it or end it, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _take_up(self) -> None:
        """Read what an earlier command has left, or begin with the settings."""
        end = 0
        for number, (line, end) in enumerate(self._lines()):  # noqa: B007  # the end of the last one is used
            if number:
                self.done.add(record_key(line))
            else:
                self._require_same(line)
        if not end and not _line(self._settings).encode().startswith(read_head(self.path)):
            raise ConfigError(
                f"{self.path} is no journal of read, which writes there; move it, or choose another --out"
            )
        self._file.truncate(end)  # behind it is a line that a killed command has not ended
        if not end:
            self.append([self._settings])

    def _require_same(self, found: Record) -> None:
        for name, value in self._settings.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{self.path} holds pages read with {name} {_short(found.get(name))}, now it is {_short(value)}; "
                    "repeat the command with the former, remove the file to begin again, or choose another --out"
                )

    def _lines(self) -> Iterator[tuple[Record, int]]:
        """Yield the objects of all whole lines with the bytes up to their ends; stop at one that is none."""
        end = 0
        with self.path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    return
                if not text.endswith(b"\n") or not isinstance(line, dict):
                    return
                end += len(text)
                yield line, end


def read_questions(path: Path) -> list[str]:
    """Return the questions of a file in UTF-8, one a line; blank lines are left out.

    Raises:
        DataError: It cannot be read, is no UTF-8, or has no question.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "expected text in UTF-8"
        raise DataError(f"--questions {path}: cannot be read ({reason})") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"--questions {path}: there is no question in the file; expected one a line")
    return found


def _line(record: Record) -> str:
    return printable(to_json(record, ensure_ascii=False)) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:58]}…{text[-60:]}"


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _markdown(record: Record) -> str:
    """Return what is asked, where it is not P_vocab's own text, and the answer or the error."""
    name = record["field"] or record["question"]
    head = f"**{_escaped(name)}**" if name and record["question"] else ""
    if record["error"] is not None:
        return f"{head}{head and ': '}not read: {_escaped(record['error'])}\n\n"
    answer = record["answer"]
    if "\n" not in answer:
        return f"{head}{head and ': '}{_escaped(answer)}\n\n"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", answer)), default=0))
    return f"{head}{head and chr(10) * 2}{fence}text\n{answer}\n{fence}\n\n"
