"""`prepare synthetic`: the training datasets and the held-out benchmark datasets of the embedded default."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignvlm_pl.errors import ConfigError

from ..pack.options import require_at_least
from .style import ROW_HEIGHT_PX
from .words import RECEIPT_QUESTIONS
from .write import DOCUMENT_KINDS, PAGE_WEIGHTS, write_split


def main(argv: Sequence[str] | None = None) -> int:
    """Write all datasets into one folder; datasets that are already there with the same arguments are kept.

    Raises:
        ConfigError: An invalid argument, a missing package, or a folder that holds something else.
    """
    args = _parser().parse_args(argv)
    require_at_least(
        0,
        train=args.train,
        lines=args.lines,
        heldout=args.heldout,
        pages=args.pages,
        strings=args.strings,
        vcr=args.vcr,
    )
    datasets = _datasets(args)
    if not datasets:
        raise ConfigError("--train, --lines, --heldout, --pages, --strings and --vcr are 0: nothing to render")
    for folder, settings in datasets.items():
        manifest = write_split(
            args.out / folder,
            seed=args.seed,
            processes=args.processes,
            fault_share=args.faults,
            **{"width": args.width, "height": args.height, **settings},
        )
        sys.stdout.write(f"{manifest.folder}: {manifest.num_samples} samples\n")
    return 0


def _datasets(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of each dataset; datasets of size 0 are skipped."""
    asked = {"questions_per_document": args.questions, "transcription_share": args.transcriptions}
    evaluation = {"split": "heldout", "num_documents": args.heldout, "one_question_per_sample": True}
    # One question per page, so that the questions are independent of each other.
    evaluation["questions_per_document"] = 1
    datasets = {
        "lines": {"split": "train", "num_documents": args.lines, "kinds": ["lines"]},
        "documents": {"split": "train", "num_documents": args.train, "kinds": args.kinds, **asked},
    }
    for kind in DOCUMENT_KINDS:
        datasets[f"heldout-{kind}s"] = {**evaluation, "kinds": [kind], "transcription_share": 0.0}
    datasets["heldout-lines"] = {**evaluation, "kinds": ["lines"], "fonts": "heldout"}
    if args.strings:
        string = {"kinds": ["string"], "height": ROW_HEIGHT_PX}
        datasets["strings"] = {"split": "train", "num_documents": args.strings, **string}
        datasets["heldout-strings"] = {**evaluation, **string}
    for kind in ("vcr-easy", "vcr-hard") if args.vcr else ():
        page = {"kinds": [kind], "height": 96, "questions_per_document": 1, "transcription_share": 0.0}
        datasets[kind] = {"split": "train", "num_documents": args.vcr, **page}
        datasets[f"heldout-{kind}"] = {**evaluation, **page}
    if args.pages:
        size = {"width": args.page_width, "height": 0}  # whole pages have the height that they need
        asked |= {"questions_per_document": args.page_questions}
        datasets["pages"] = {"split": "train", "num_documents": args.pages, "kinds": args.page_kinds, **size, **asked}
        # The usual questions only, which come first.
        size |= {"questions_per_document": len(RECEIPT_QUESTIONS)}
        datasets["heldout-receipt-pages"] = {**datasets["heldout-receipts"], **size, "kinds": ["receipt-page"]}
    return {name: settings for name, settings in datasets.items() if settings["num_documents"] > 0}


def _weights(text: str) -> dict[str, float]:
    """Read ``form=1,table=0.5``; a kind without a number weighs 1."""
    pairs = [entry.partition("=") for entry in text.split(",") if entry]
    return {kind.strip(): float(weight or 1) for kind, _, weight in pairs}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare synthetic",
        description="Render synthetic receipts, forms, tables, charts and lines of text into WebDataset shards.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; each dataset gets a folder in it")
    weights = "weights of training documents: form=1,receipt=1,table=1"
    parser.add_argument("--kinds", type=_weights, default=DOCUMENT_KINDS, help=weights)
    weights = "weights of training pages: receipt-page=3,form-page=1,table-page=1 (the default)"
    parser.add_argument("--page-kinds", type=_weights, default=PAGE_WEIGHTS, help=weights)
    numbers: dict[str, tuple[float, str]] = {
        "--train": (4000, "training documents with questions"),
        "--lines": (4000, "training pages of plain lines"),
        "--heldout": (100, "documents in each held-out dataset"),
        "--pages": (0, "whole training pages, and the held-out dataset of whole receipts if not 0"),
        "--strings": (0, "training pages of one row with 2 to 6 signs, and the held-out dataset of such if not 0"),
        "--vcr": (
            0,
            "pages with a covered word in each of the two datasets, easy and hard, and held-out ones if not 0",
        ),
        "--questions": (4, "most questions per training document"),
        "--page-questions": (8, "most questions per whole training page"),
        "--transcriptions": (0.1, "share of training documents to be transcribed"),
        "--faults": (0.67, "share of pages with noise, blur, …"),
        "--width": (256, "width of a page in px"),
        "--height": (128, "height of a page in px, 32 per row"),
        "--page-width": (768, "width of a whole page in px; its height is that of its content"),
        "--seed": (0, "another seed gives other documents"),
        "--processes": (2, "processes that render"),
    }
    for option, (default, what) in numbers.items():
        parser.add_argument(option, type=type(default), default=default, help=f"{what} (default: {default})")
    return parser
