"""Whole pages: what they promise to training, and that the small documents did not change beside them."""

import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import pairwise, product
from pathlib import Path
from random import Random

import PIL
import pytest

from alignvlm_pl.errors import ConfigError
from datamodules.prepare.synthetic import PAGE_KINDS, Document, generate_document
from datamodules.prepare.synthetic.command import main
from datamodules.prepare.synthetic.generate import PAGE_LAYOUTS
from datamodules.prepare.synthetic.lexicon import lexicon_digest, prints
from datamodules.prepare.synthetic.sheet import Sheet
from datamodules.prepare.synthetic.style import draw_page_style
from datamodules.prepare.synthetic.words import CURRENCIES, LABELS, RECEIPT_QUESTIONS, USUAL
from datamodules.shards.manifest import load_manifest

SEEDS = range(8)
KIND_AND_SPLIT = [(kind, split) for kind in PAGE_KINDS for split in ("train", "heldout")]


@cache
def _page(seed: int, kind: str, split: str) -> Document:
    return generate_document(seed, split=split, kind=kind, width=768, num_questions=100, transcription_share=0.0)


def _usual_answers(page: Document) -> dict[str, str]:
    """Answers of the four usual questions by name, whichever way they are asked."""
    names = {text: name for name, texts in RECEIPT_QUESTIONS.items() for text in (*texts, f"What is the {name}?")}
    return {names[turn.text]: turn.answer for turn in page.turns if turn.text in names}


@pytest.mark.parametrize("kind", PAGE_KINDS)
def test_the_same_arguments_give_the_same_bytes(kind: str) -> None:
    settings = {"split": "train", "kind": kind, "width": 768}
    first, second = generate_document(3, **settings), generate_document(3, height=64, **settings)  # type: ignore[arg-type]
    assert first.encoded == second.encoded and first.record() == second.record()
    assert generate_document(4, **settings).encoded != first.encoded  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_each_line_stands_in_a_row_of_its_own(kind: str, split: str) -> None:
    for seed in SEEDS:
        page = _page(seed, kind, split)
        width, height = page.image.size
        assert width == 768 and height % 32 == 0 and height >= 12 * 32
        rows = []
        for line in page.lines:
            x0, y0, x1, y1 = line["box"]
            text, where = line["text"], f"seed {seed}: {line}"
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, where
            assert y1 - y0 <= 40 and len(text) + sum(a == b for a, b in pairwise(text)) <= width // 8, where
            rows.append(int((y0 + y1) / 2 // 32))
        assert rows == sorted(set(rows)), seed


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_pieces_of_a_row_stand_apart(kind: str, split: str) -> None:
    for seed in range(25):
        rng = Random(seed)
        style = draw_page_style(rng, fonts="train")
        sheet = Sheet(rng=rng, split=split, style=style, width=768, num_rows=0)
        PAGE_LAYOUTS[kind](sheet)
        pieces = sorted(sheet.segments, key=lambda piece: (piece.row, piece.left))
        for left, right in pairwise(pieces):
            assert left.row < right.row or left.left + left.width + 12 <= right.left, (seed, left, right)
        edges = [edge for piece in pieces for edge in (piece.left, piece.left + piece.width)]
        assert sheet.left - 1 <= min(edges) and max(edges) <= sheet.right + 1, seed


def test_receipts_are_as_long_as_real_ones() -> None:
    rows = sorted(_page(seed, "receipt-page", "train").image.height // 32 for seed in SEEDS)
    assert rows[0] >= 24 and rows[-1] <= 76 and 32 <= rows[len(rows) // 2] <= 48


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_each_question_has_one_answer_and_it_is_printed(kind: str, split: str) -> None:
    for seed in SEEDS:
        page = _page(seed, kind, split)
        printed, answers = " ".join(line["text"] for line in page.lines), dict[str, str]()
        for turn in page.turns:
            assert turn.answer in printed, (seed, turn)
            assert answers.setdefault(turn.text.lower(), turn.answer) == turn.answer, (seed, turn)
        assert len(answers) >= 8


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_each_receipt_answers_the_usual_questions(split: str) -> None:
    plain = 0
    for seed in SEEDS:
        page = _page(seed, "receipt-page", split)
        answers, texts = _usual_answers(page), [line["text"] for line in page.lines]
        assert set(answers) == {"company", "date", "address", "total"}, seed
        # The total is not just any amount: it ends a row whose label says so.
        label = "total|due|pay|balance"
        rows = [text.removesuffix(answers["total"]) for text in texts if text.endswith(answers["total"])]
        assert any(re.search(label, row.lower()) for row in rows), (seed, answers, rows)
        # The address is whole lines of the page, joined by a blank.
        joined = {" ".join(texts[start:end]) for start in range(len(texts)) for end in range(start + 2, start + 6)}
        assert answers["address"] in joined, (seed, answers)
        plain += sum(turn.text == "What is the total?" for turn in page.turns)
    assert 0 < plain < len(SEEDS)


def test_the_usual_questions_come_first_of_all() -> None:
    orders = set()
    for seed in range(4):
        settings = {"width": 768, "num_questions": 4, "transcription_share": 0.0}
        page = generate_document(seed, split="train", kind="receipt-page", **settings)  # type: ignore[arg-type]
        orders.add(tuple(_usual_answers(page)))
        assert len(page.turns) == 4 and set(_usual_answers(page)) == set(RECEIPT_QUESTIONS)
    assert len(orders) > 2


def _amount(page: Document, labels: Sequence[str]) -> int | None:
    """Return the amount in cents of the row with one of these labels."""
    names = "|".join(
        {re.escape(label.format(tax="", rate=0, currency=currency)) for label in labels for currency in CURRENCIES}
    )
    pattern = rf"({names})[ :]*(?:{'|'.join(map(re.escape, CURRENCIES))})? ?([\d,]+\.\d\d)"
    rows = [re.fullmatch(pattern, line["text"], re.IGNORECASE) for line in page.lines]
    found = [row[2] for row in rows if row]
    return int(re.sub(r"\D", "", found[-1])) if found else None


def test_what_was_paid_less_the_total_is_the_change() -> None:
    checked = 0
    for seed, split in product(SEEDS, ("train", "heldout")):
        page = _page(seed, "receipt-page", split)
        cash, change = _amount(page, LABELS["cash"]), _amount(page, LABELS["changes"])
        if cash is not None and change is not None:
            assert cash - int(re.sub(r"\D", "", _usual_answers(page)["total"])) == change, seed
            checked += 1
    assert checked >= 8


def test_heldout_pages_share_usual_words_only_with_training_pages() -> None:
    found = {}
    for split in ("train", "heldout"):
        texts = [line["text"] for kind in PAGE_KINDS for seed in SEEDS for line in _page(seed, kind, split).lines]
        found[split] = {print_ for text in texts for part in re.split(r"[\s:]+", text) for print_ in prints(part)}
        assert {"total", "cash"} & found[split], "both splits have labels"
    assert len(found["heldout"] - USUAL) > 300
    shared = (found["heldout"] & found["train"]) - USUAL
    assert not {print_ for print_ in shared if not re.fullmatch(r"\d{1,2}(am|pm)?", print_)}


def test_no_heldout_answer_of_a_receipt_is_one_of_training() -> None:
    train, heldout = (
        {answer.lower() for seed in SEEDS for answer in _usual_answers(_page(seed, "receipt-page", split)).values()}
        for split in ("train", "heldout")
    )
    assert len(heldout) == 4 * len(SEEDS) and not train & heldout


@pytest.mark.parametrize(("kind", "width"), [("receipt-page", 770), ("form-page", 512)])
def test_an_invalid_width_is_refused(kind: str, width: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 640 in steps of 8 px, found {width}"):
        generate_document(0, split="train", kind=kind, width=width)


def test_the_command_writes_pages(tmp_path: Path) -> None:
    argv = [
        "--out",
        str(tmp_path),
        "--train",
        "0",
        "--lines",
        "0",
        "--heldout",
        "1",
        "--pages",
        "3",
        "--processes",
        "1",
    ]
    assert main([*argv, "--page-width", "640", "--page-kinds", "receipt-page=1,table-page=1"]) == 0
    folders = {folder.name: load_manifest(folder) for folder in tmp_path.iterdir()}
    assert {"pages", "heldout-receipt-pages", "heldout-receipts"} <= set(folders)
    assert folders["pages"].num_samples == 3 and folders["heldout-receipt-pages"].num_samples == 4
    arguments = folders["pages"].extra["arguments"]
    assert arguments["width"] == 640 and arguments["kinds"] == {"receipt-page": 1.0, "table-page": 1.0}


VERSIONS = ("13.0.0", "fa1f45ee2bd0282c")
"""Version of Pillow, by whose widths of text the boxes are, and checksum of the words, of the recorded documents."""


@pytest.mark.skipif((PIL.__version__, lexicon_digest()) != VERSIONS, reason="recorded with other packages")
def test_the_small_documents_are_what_they_were() -> None:
    digest = sha256()
    for kind in ("lines", "form", "receipt", "table", "chart"):  # the others came later
        for split in ("train", "heldout"):
            for seed in range(3):
                digest.update(repr(generate_document(seed, split=split, kind=kind).record()).encode())
    assert digest.hexdigest() == "0fb64a59e7a21849c8b12122098c200d971e7c9ed7634115b0e486a16568c601"
