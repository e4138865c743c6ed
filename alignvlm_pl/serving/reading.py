"""Read files page by page: choose the pages, ask in batches, show progress, and collect what could not be read."""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import DataError
from .model import Answer, PreparedPrompt, Prompt, ServedModel
from .pages import PageRange, count_pages, open_document
from .records import Key, Record, record_key, record_of

log = logging.getLogger(__name__)
LINE_SECONDS = 30.0
"""Time between two lines of progress where there is no terminal."""
READOUT = "readout"
"""Field of the records of P_vocab's own text, which has no question."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about each page: a name or None, and the question; None for P_vocab's own text."""

    field: str | None
    text: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is read.

    Args:
        files: See `pages.find_files`.
        questions: At least one, all different.
        pages: None for all.
        dpi: Of the pages of PDFs.
        batch_size: Questions that are answered together; the pages of as many are in memory.
        max_new_tokens: Of an answer.
    """

    files: Sequence[Path]
    questions: Sequence[Question]
    pages: PageRange | None
    dpi: int
    batch_size: int
    max_new_tokens: int

    def settings(self, model: ServedModel) -> dict[str, Any]:
        """Return what the records depend on, by the names of the options."""
        return {
            "model": model.hash,
            "questions": [[one.field, one.text] for one in self.questions],
            "--pages": self.pages and self.pages.text,
            "--dpi": self.dpi,
            "--page-width": model.page_width,
            "--max-new-tokens": self.max_new_tokens,
        }


@dataclass(slots=True)
class _Waiting:
    """Prompts of the next batch, the records that they will answer, and how many pages are done then."""

    prompts: list[PreparedPrompt] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    pages: int = 0


class Reading:
    """Read the pages of a plan with a model; `failures` are the records of what could not be read, with `error`."""

    def __init__(self, model: ServedModel, plan: Plan, *, done: Collection[Key] = ()) -> None:
        self.model, self.plan, self.failures = model, plan, list[Record]()
        self._done, self._waiting = done, _Waiting()

    def run(self, emit: Callable[[list[Record]], None], *, bar: bool) -> list[str]:
        """Read all pages, and call `emit` with the records of each batch; those whose keys are `done` are left out.

        Progress goes to stderr: with `bar` as a bar, else as lines of the log.

        Returns:
            A message for each file or page that could not be read.
        """
        total = count_pages(self.plan.files, self.plan.pages, dpi=self.plan.dpi)
        with Progress(total, bar=bar) as self._progress:
            for path in self.plan.files:
                for records in self._read_file(path):
                    emit(records)
            if records := self._answer():
                emit(records)
        return list(dict.fromkeys(record["error"] for record in self.failures))

    def _read_file(self, path: Path) -> Iterator[list[Record]]:
        """Yield the records of the batches that become full."""
        try:
            with open_document(path, dpi=self.plan.dpi) as document:
                count, pages = len(document), self.plan.pages
                if pages is not None and (missing := pages.first_missing(count)) is not None:
                    self._fail(record_of(path, missing), f"{path} has {count} page(s), --pages {pages.text} asks for "
                               f"page {missing}; name pages that are there, or an open end such as 1-")  # fmt: skip
                for number in pages.numbers(count) if pages is not None else range(1, count + 1):
                    blank = [self._blank(path, number, question) for question in self.plan.questions]
                    asked = [record for record in blank if record_key(record) not in self._done]
                    if asked:
                        yield from self._read_page(asked, partial(document.page, number))
                    else:
                        self._progress.add_pages(1, is_new=False)
        except DataError as error:
            self._fail(record_of(path), str(error))

    def _blank(self, path: Path, number: int, question: Question) -> Record:
        return record_of(path, number, field=question.field, question=question.text, model=self.model.hash)

    def _read_page(self, asked: list[Record], load: Callable[[], Image.Image]) -> Iterator[list[Record]]:
        """Prepare what is asked about a page, and yield the records of the batches that become full meanwhile."""
        try:
            page = self.model.fit_page(load())
        except DataError as error:
            for record in asked:
                self._fail(record, str(error))
            self._progress.add_pages(1)
            return
        if asked[0]["question"] is None:
            yield [_answered(asked[0], self.model.read_out(page))]
            self._progress.add_pages(1)
            return
        size = self.plan.batch_size
        for start in range(0, len(asked), size):  # the questions about a page together: it is encoded once for them
            part = asked[start : start + size]
            if self._waiting.prompts and len(self._waiting.prompts) + len(part) > size:
                yield self._answer()
            for record in part:
                self._prepare(record, page)
        self._waiting.pages += 1

    def _prepare(self, record: Record, page: Image.Image) -> None:
        prompt = Prompt(page=page, question=record["question"], max_new_tokens=self.plan.max_new_tokens)
        try:
            self._waiting.prompts.append(self.model.prepare(prompt))
        except DataError as error:
            self._fail(record, f"{record['source']}: page {record['page']}: {error}")
        else:
            self._waiting.records.append(record)

    def _answer(self) -> list[Record]:
        """Return the records of the waiting batch, none where nothing waits."""
        waiting, self._waiting = self._waiting, _Waiting()
        try:
            answers = self.model.answer(waiting.prompts) if waiting.prompts else []
        except DataError as error:  # of which of the pages is not known
            for record in waiting.records:
                self._fail(record, f"{record['source']}: page {record['page']}, or another of its batch: {error}")
            answers, waiting.records = [], []
        self._progress.add_pages(waiting.pages)
        return [_answered(record, answer) for record, answer in zip(waiting.records, answers, strict=True)]

    def _fail(self, record: Record, message: str) -> None:
        self.failures.append({**record, "model": self.model.hash, "error": message})


def _answered(record: Record, answer: Answer) -> Record:
    return {
        **record,
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "finish_reason": answer.finish_reason,
    }


class Progress:
    """Pages read, pages a second and the time left, on stderr."""

    def __init__(self, total: int, *, bar: bool) -> None:
        self._total, self._pages, self._read = total, 0, 0
        self._bar = tqdm(total=total, unit="page", file=sys.stderr) if bar else None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            before = self._pages - self._read
            kept = f", {before} were read before" if before else ""
            seconds = time.monotonic() - self._started
            noun = "page" if self._read == 1 else "pages"
            log.info("%d %s in %.1f s, %.2f pages/s%s", self._read, noun, seconds, self._speed(), kept)

    def add_pages(self, count: int, *, is_new: bool = True) -> None:
        """Count pages; those that are not new were read by an earlier command, and do not count for the speed."""
        self._pages += count
        self._read += count * is_new
        if self._bar is not None:
            if not is_new:
                self._bar.initial += count
            self._bar.update(count)
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            speed = self._speed()
            left = tqdm.format_interval((self._total - self._pages) / speed) if speed else "?"
            log.info("%d of %d pages, %.2f pages/s, ETA %s", self._pages, self._total, speed, left)

    def _speed(self) -> float:
        return self._read / max(time.monotonic() - self._started, 1e-9)
