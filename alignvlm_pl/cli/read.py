"""`read`: answers for the pages of files, from a trained model."""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, require_at_least

_SOURCES = ("question", "questions", "fields", "prompt")
_TOKENS = {"transcribe": 1024}
_DEFAULT_TOKENS = 160
_ENDINGS = {".csv": "csv", ".md": "md"}


def run(argv: list[str]) -> int:
    """Write a record for each page and question; 1 if something could not be read, which is listed at the end."""
    options = _parser().parse_args(argv[1:])
    _check(options)
    from ..serving.pages import find_files

    if "-" in options.files and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files that are no UTF-8, as in arguments
    asked, files = _asked(options), find_files(options.files, listed=sys.stdin)
    from ..serving.model import ServedModel
    from ..serving.reading import Plan, Reading
    from ..serving.records import Journal, record_writer

    model = ServedModel(options.model, page_width=options.page_width)
    plan = Plan(
        files=files,
        questions=_questions(options, asked, model),
        pages=options.pages,
        dpi=options.dpi,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    if options.out is None:
        reading = Reading(model, plan)
        write = record_writer(sys.stdout, options.to)

        def emit(records: list[dict[str, Any]]) -> None:
            for record in records:
                write(record)
            sys.stdout.flush()

        failed = reading.run(emit, bar=sys.stderr.isatty() and not os.isatty(1))
        emit(reading.failures)
    else:
        with Journal(options.out, plan.settings(model)) as journal:
            reading = Reading(model, plan, done=journal.done)
            failed = reading.run(journal.append, bar=sys.stderr.isatty())
            journal.finish(reading.failures, options.to)
    for message in failed:
        sys.stderr.write(f"not read: {message}\n")
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Raise a ConfigError for options that are out of range or exclude each other, and fill those in that follow."""
    from ..serving.pages import PageRange

    given = [f"--{name}" for name in _SOURCES if getattr(options, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"read takes one of --question, --questions, --fields and --prompt, found {' and '.join(given) or 'none'}"
        )
    if options.max_new_tokens is None:
        options.max_new_tokens = _TOKENS.get(options.prompt, _DEFAULT_TOKENS)
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("dpi", 1), ("page_width", 0)):
        require_at_least(least, "", **{f"--{name.replace('_', '-')}": getattr(options, name)})
    options.pages = None if options.pages is None else PageRange.parse(options.pages)
    if options.to is None:
        options.to = _ENDINGS.get(options.out.suffix.lower() if options.out else "", "jsonl")


def _asked(options: argparse.Namespace) -> list[str]:
    """Return the names of fields, the questions or the prompt, each once; a ConfigError or DataError for none."""
    if options.prompt is not None:
        return [options.prompt]
    if options.fields is not None:
        asked = [name.strip() for name in options.fields.split(",") if name.strip()]
        if not asked:
            raise ConfigError(f"--fields {options.fields!r}: expected names with commas between them")
    elif options.questions is not None:
        from ..serving.records import read_questions

        asked = read_questions(options.questions)
    else:
        asked = options.question
        if empty := [text for text in asked if not text.strip()]:
            raise ConfigError(f"--question {empty[0]!r}: expected a question")
    return list(dict.fromkeys(asked))


def _questions(options: argparse.Namespace, asked: list[str], model: Any) -> list[Any]:
    """Return what is asked about each page, in the words of the model."""
    from ..serving.reading import READOUT, Question

    if options.prompt == READOUT:
        model.require_readout()
        return [Question(READOUT, None)]
    if options.prompt is not None:
        return [Question(options.prompt, model.transcription_question)]
    if options.fields is not None:
        return [Question(name, model.field_question.format(name)) for name in asked]
    return [Question(None, text) for text in asked]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignvlm read",
        description="Ask a trained model about pages; a record for each page and question. Details: docs/reading.md",
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="images, PDFs, folders, globs, or - for a list of files on stdin")
    add("--model", default="box:receipts", help="hf folder of a stage, or box:NAME (%(default)s)")
    add("--question", action="append", metavar="TEXT", help="a question about each page; may be given several times")
    add("--questions", type=Path, metavar="FILE", help="a file with a question on each line")
    add("--fields", metavar="NAMES", help="names with commas between them: company,date,address,total")
    add("--prompt", choices=("transcribe", "readout"), help="all text: as an answer, or P_vocab's own without the LLM")
    add("--pages", metavar="RANGE", help="pages of each file, such as 1-5,9 or 3-; default: all")
    add("--dpi", type=int, default=200, help="at which pages of PDFs are rendered (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="questions answered together (%(default)s)")
    add("--to", choices=("jsonl", "csv", "md"), help="form of the records; default: by the ending of --out, or jsonl")
    add("--out", type=Path, help="file to write when all is read, where a killed command resumes; default: stdout")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer; default: 160, with --prompt transcribe 1024")
    add("--page-width", type=int, metavar="PX", help="cut pages to their content and scale them to it; 0: leave them")
    return parser
