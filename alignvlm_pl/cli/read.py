"""`read`: fields of pages, answered by a trained model."""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError, ConfigError, DataError

COLUMNS = ("source", "page", "field", "answer")


def run(argv: list[str]) -> int:
    """Write a record for each page and field; 1 if a file could not be read, which is named at the end."""
    options = _parser().parse_args(argv[1:])
    fields = [name.strip() for name in options.fields.split(",") if name.strip()]
    if not fields or options.max_new_tokens < 1 or (options.page_width or 0) < 0:
        raise ConfigError(
            f"--fields {options.fields!r} --max-new-tokens {options.max_new_tokens} --page-width {options.page_width}: "
            "expected names with commas between them, at least 1 token, and a width in px, or 0"
        )
    if options.out is None:
        failed = _read_files(options, fields, sys.stdout)
    else:
        from ..utils.atomic_files import atomic_path

        with atomic_path(options.out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            failed = _read_files(options, fields, file)
    for message in failed:
        sys.stderr.write(f"not read: {message}\n")
    return 1 if failed else 0


def ask_page(model: Any, processor: Any, page: Any, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Return the answer to each of the questions about a page, an RGB image, independently of each other.

    The page is encoded once; answers are greedy and have at most `max_new_tokens` tokens.
    """
    asked = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    prompts = [processor.encode(messages, [page], generation=True) for messages in asked]
    batch = processor.collate(prompts, pad_left=True)
    del batch["labels"]
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answers: list[str] = processor.post_process_image_text_to_text(ids[:, batch["input_ids"].shape[1] :])
    return answers


def _read_files(options: argparse.Namespace, fields: list[str], file: IO[str]) -> list[str]:
    """Write the records of all files, each page's when it is done; return what could not be read, and why."""
    from ..models.loading import reading_settings
    from ..models.modeling import AlignVLMForConditionalGeneration
    from ..models.processing import AlignVLMProcessor
    from ..preprocessing.images.trim import scale_to_width, trim_page
    from ..preprocessing.imaging import load_image

    folder = _folder(options.model)
    model, processor = (one.from_pretrained(folder) for one in (AlignVLMForConditionalGeneration, AlignVLMProcessor))
    model.eval()
    settings = reading_settings(folder)
    width = settings["page_width"] if options.page_width is None else options.page_width
    questions = [settings["question"].format(name) for name in fields]
    write, failed = _writer(file, options.to), []
    for source in options.files:
        try:
            page = load_image(source)
        except DataError as error:
            failed.append(str(error))
            continue
        if width:
            page = scale_to_width(trim_page(page)[0], width)
        answers = ask_page(model, processor, page, questions, max_new_tokens=options.max_new_tokens)
        for name, answer in zip(fields, answers, strict=True):
            write({"source": str(source), "page": 1, "field": name, "answer": answer})
        file.flush()
    return failed


def _folder(model: str) -> str:
    from ..models.loading import require_model_type, weights_folder

    folder = weights_folder(model)
    if not Path(folder).is_dir():
        raise CheckpointError(f"--model {model}: there is no such folder; give an exported folder, or box:receipts")
    require_model_type(folder, "alignvlm")
    return folder


def _writer(file: IO[str], kind: str) -> Any:
    if kind == "jsonl":
        return lambda record: file.write(json.dumps(record, ensure_ascii=False) + "\n")
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    return table.writerow


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignvlm read",
        description="Ask a trained model for fields of pages: a record with source, page, field and answer for each.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="images; of a file with pages the first")
    parser.add_argument("--model", default="box:receipts", help="hf folder of a stage, or box:NAME (%(default)s)")
    parser.add_argument("--fields", required=True, help="names with commas between them: company,date,address,total")
    parser.add_argument("--to", choices=("jsonl", "csv"), default="jsonl", help="form of the records (%(default)s)")
    parser.add_argument("--out", type=Path, help="file to write when all is read; default: as it is read, to stdout")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="of an answer (%(default)s)")
    parser.add_argument(
        "--page-width", type=int, help="cut pages to their content and scale them to this width in px; 0: leave them"
    )
    return parser
