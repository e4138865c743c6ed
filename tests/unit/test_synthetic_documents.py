"""What one generated document promises: geometry the readout needs, and questions the page answers."""

import io
import string
from dataclasses import replace
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError
from datamodules.prepare.synthetic import KINDS, generate_document, layouts
from datamodules.prepare.synthetic.command import main
from datamodules.prepare.synthetic.covered import VISIBLE
from datamodules.prepare.synthetic.generate import LAYOUTS, render_sheet
from datamodules.prepare.synthetic.resources import package_folder
from datamodules.prepare.synthetic.sheet import Sheet
from datamodules.prepare.synthetic.style import draw_style, load_faces
from datamodules.shards.manifest import load_manifest
from datamodules.shards.sample import check_record

SEEDS = range(25)
KIND_AND_SPLIT = [(kind, split) for kind in KINDS for split in ("train", "heldout")]


def _sheet(seed: int, split: str) -> Sheet:
    rng = Random(seed)
    style = draw_style(rng, fonts="train")
    return Sheet(rng=rng, split=split, style=style, width=256, num_rows=4, fault_share=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_bytes(kind: str) -> None:
    first, second = (generate_document(3, split="train", kind=kind) for _ in range(2))
    assert first.encoded == second.encoded
    assert first.record() == second.record()
    assert generate_document(4, split="train", kind=kind).encoded != first.encoded


def test_a_string_is_two_to_six_signs_on_a_page_of_one_row(tmp_path: Path) -> None:
    texts, lefts = set(), set()
    for seed in range(60):
        document = generate_document(seed, split="heldout", kind="string", height=32)
        (line,), (turn,) = document.lines, document.turns
        assert document.image.size == (256, 32)
        assert turn.answer == line["text"]
        assert 2 <= len(line["text"]) <= 6 and line["text"].isalnum() and line["text"].upper() == line["text"]
        texts.add(line["text"])
        lefts.add(line["box"][0] // 32)
    assert len(texts) > 55 and len(lefts) > 4
    with pytest.raises(ConfigError, match="height of at least 96"):
        generate_document(0, split="train", kind="form", height=32)
    argv = ["--out", str(tmp_path), "--strings", "5", "--train", "0", "--lines", "0", "--heldout", "3"]
    assert main([*argv, "--processes", "1"]) == 0
    counts = {name: load_manifest(tmp_path / name).num_samples for name in ("strings", "heldout-strings")}
    assert counts == {"strings": 5, "heldout-strings": 3}


@pytest.mark.parametrize("kind", ["vcr-easy", "vcr-hard"])
def test_of_a_covered_word_its_upper_and_lower_rows_of_pixels_show(kind: str) -> None:
    share = VISIBLE[kind.removeprefix("vcr-")]
    for seed in range(12):
        sheets = []
        for covered in (True, False):
            rng = Random(f"{seed}")
            sheet = replace(_sheet(seed, "train"), rng=rng, num_rows=3, skew_deg=0.0)
            LAYOUTS[kind](sheet)
            ((index, visible),) = sheet.covers.items()
            assert visible == share
            sheet.covers = {index: visible} if covered else {}
            sheets.append((sheet.segments[index], *render_sheet(sheet)))
        (word, page, _, _, boxes), (_, whole, _, _, _) = sheets
        left, top, right, bottom = (int(edge) for edge in boxes[index])
        edge = round(share * (bottom - top))
        found, expected = (np.asarray(one, dtype=int) for one in (page, whole))
        changed = np.argwhere(np.abs(found - expected) > 60)  # JPEG changes a little everywhere
        assert len(changed), "the word is covered"
        assert top + edge - 2 <= changed[:, 0].min() and changed[:, 0].max() <= bottom - edge + 1
        assert left - 3 <= changed[:, 1].min() and changed[:, 1].max() <= right + 3
        ink = np.abs(expected[top : bottom + 1, left : right + 1] - sheet.style.paper) > 60
        assert ink[:edge].any() and ink[-edge:].any(), "and its edges are not"
        assert len([one for one in word.text if one.isalnum()]) >= 4
        assert found[:60].std() > 5, "there is a picture above"


def test_a_covered_word_is_asked_for(tmp_path: Path) -> None:
    document = generate_document(1, split="heldout", kind="vcr-hard", height=96, transcription_share=0.0)
    (turn,), (line,) = document.turns, document.lines
    assert turn.answer in line["text"].split()
    argv = ["--out", str(tmp_path), "--vcr", "4", "--train", "0", "--lines", "0", "--heldout", "3", "--processes", "1"]
    assert main(argv) == 0
    names = ("vcr-easy", "vcr-hard", "heldout-vcr-easy", "heldout-vcr-hard")
    assert [load_manifest(tmp_path / name).num_samples for name in names] == [4, 4, 3, 3]


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_each_line_fits_its_row_of_tokens(kind: str, split: str) -> None:
    for seed in SEEDS:
        document = generate_document(seed, split=split, kind=kind)
        rows = []
        for line in document.lines:
            x0, y0, x1, y1 = line["box"]
            text, where = line["text"], f"seed {seed}: {line}"
            assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 128, where
            offset = (y0 + y1) / 2 % 32 - 16
            assert abs(offset) <= 6.5, where  # the ink of one letter is not centred; its row is
            rows.append(int((y0 + y1) / 2 // 32))
            doubled = sum(a == b for a, b in pairwise(text))
            assert len(text) + doubled <= 256 // 8, where
            assert (x1 - x0 + 12) / 8 >= len(text) + doubled, where  # side bearings are no ink
        assert rows == sorted(set(rows))


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_each_answer_is_printed_on_the_page(kind: str, split: str) -> None:
    for seed in SEEDS:
        document = generate_document(seed, split=split, kind=kind, num_questions=9)
        page = "\n".join(line["text"] for line in document.lines)
        assert document.turns
        for turn in document.turns:
            assert turn.answer in page, (seed, turn, page)
            assert "{" not in turn.text or "{" in page


def test_a_question_has_one_answer() -> None:
    for kind, split in KIND_AND_SPLIT:
        for seed in SEEDS:
            turns = generate_document(seed, split=split, kind=kind, num_questions=20).turns
            by_text: dict[str, set[str]] = {}
            for turn in turns:
                by_text.setdefault(turn.text, set()).add(turn.answer)
            assert all(len(answers) == 1 for answers in by_text.values()), (kind, seed)


def test_boxes_cover_the_ink_after_skew() -> None:
    """Painting all boxes with paper leaves a page without ink, skewed or not."""
    for seed in range(60):
        sheet = _sheet(seed, "train")
        sheet.style = replace(sheet.style, ink=0, paper=255)
        layouts.lines(sheet)
        sheet.shapes.clear()
        image, _, extension, boxes = render_sheet(sheet)
        for x0, y0, x1, y1 in boxes:
            image.paste(255, (floor(x0) - 1, floor(y0) - 1, ceil(x1) + 1, ceil(y1) + 1))
        assert min(image.tobytes()) > (150 if extension == "jpg" else 250), seed


@pytest.mark.parametrize(("kind", "split"), KIND_AND_SPLIT)
def test_pieces_of_a_row_stand_apart(kind: str, split: str) -> None:
    for seed in range(60):
        sheet = _sheet(seed, split)
        LAYOUTS[kind](sheet)
        for row in range(sheet.num_rows):
            pieces = sorted((piece.left, piece.left + piece.width) for piece in sheet.segments if piece.row == row)
            assert all(left[1] + 5 <= right[0] for left, right in pairwise(pieces)), (
                seed,
                row,
                sheet.segments,
            )
            assert all(start >= 0 and end <= sheet.width for start, end in pieces), (
                seed,
                row,
                sheet.segments,
            )


def test_narrow_letters_get_a_column_each() -> None:
    for seed in range(20):
        style = draw_style(Random(seed), fonts="train")
        assert style.text_width("illili") >= 8 * 8  # six letters, one doubled, one spare
        assert style.text_width("1111") >= 8 * 8


def test_no_text_is_made_twice_for_a_page() -> None:
    sheet = _sheet(0, "train")
    options = iter(["cat", "Cat", "c-a-t", "dog"])
    assert [sheet.fit(lambda: next(options), 100) for _ in range(2)] == ["cat", "dog"]


def test_a_record_keeps_the_normal_form() -> None:
    document = generate_document(1, split="heldout", kind="form")
    record = document.record(document.turns[0])
    check_record(record, num_images=1, where="test")
    assert record["references"] == [document.turns[0].answer]
    assert [part["type"] for part in record["messages"][0]["content"]] == ["image", "text"]
    with Image.open(io.BytesIO(document.encoded)) as stored:
        assert stored.tobytes() == document.image.tobytes()


def test_lines_use_every_printable_character() -> None:
    text = "".join(
        line["text"] for seed in range(1200) for line in generate_document(seed, split="train", kind="lines").lines
    )
    assert set(string.printable[:95]) <= set(text)
    letters = [character for character in text if character.isalpha()]
    assert 0.4 < sum(character.isupper() for character in letters) / len(letters) < 0.75


def test_heldout_fonts_are_no_training_fonts() -> None:
    train, heldout = ({face.family for face in load_faces(fonts)} for fonts in ("train", "heldout"))
    assert not train & heldout and len(train) == 8 and len(heldout) == 2
    assert not any("Thin" in face.path.stem for face in load_faces("train"))


def test_a_table_may_have_more_rows_than_a_real_dataset() -> None:
    for seed in range(8):
        document = generate_document(seed, split="train", kind="table", width=768, height=1024)
        assert len(document.lines) == 32


@pytest.mark.parametrize(("width", "height"), [(320, 96), (256, 160), (256, 96), (512, 128)])
def test_other_sizes(width: int, height: int) -> None:
    for kind in KINDS:
        document = generate_document(2, split="heldout", kind=kind, width=width, height=height)
        assert document.image.size == (width, height)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "recipt"}, "unknown 'recipt'; did you mean 'receipt'"),
        ({"fonts": "held"}, "unknown 'held'"),
        ({"width": 250}, "found 250x128"),
        ({"height": 100}, "found 256x100"),
        ({"num_questions": 0}, "expected 1 or more, found 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_document(0, split="train", **arguments)  # type: ignore[arg-type]


def test_a_missing_package_names_the_pip_command() -> None:
    with pytest.raises(ConfigError, match="pip install font-of-nobody"):
        package_folder("font_of_nobody")
    assert isinstance(package_folder("faker"), Path)
