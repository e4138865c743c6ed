"""`alignvlm read` with the model in the box, on synthetic receipts that it never saw."""

import csv
import io
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.models.loading import weights_folder
from alignvlm_pl.serving.model import Prompt, ServedModel
from alignvlm_pl.serving.records import COLUMNS
from alignvlm_pl.training.export import read_record
from datamodules.prepare.synthetic import generate_document

BOX = "box:receipts"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, str]]]:
    """Files of two receipts, with the answers to the usual questions."""
    folder, found = tmp_path_factory.mktemp("receipts"), []
    for seed in range(100):
        document = generate_document(
            seed, split="heldout", kind="receipt-page", width=768, num_questions=4, transcription_share=0, fault_share=0
        )
        answers = {turn.text.removeprefix("What is the ").removesuffix("?"): turn.answer for turn in document.turns}
        if not {"date", "total"} <= answers.keys() or len(document.lines) > 30:
            continue  # asked in other words, or long
        file = folder / f"{seed}.{document.extension}"
        file.write_bytes(document.encoded)
        found.append((file, answers))
        if len(found) == 2:
            break
    return found


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel(BOX)


def test_fields_of_pages_are_read(receipts, tmp_path: Path, capfd) -> None:
    files = [str(file) for file, _ in receipts]
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    options = ["--model", BOX, "--fields", "date, total", "--max-new-tokens", "16"]
    assert main(["read", files[0], str(broken), files[1], *options, "--to", "csv"]) == 1
    out, err = capfd.readouterr()
    *rows, first, second = csv.DictReader(io.StringIO(out))
    assert out.splitlines()[0] == ",".join(COLUMNS)
    asked = [(file, field, answers[field]) for file, answers in receipts for field in ("date", "total")]
    assert [(row["source"], row["page"], row["field"], row["question"]) for row in rows] == [
        (str(file), "1", field, f"What is the {field}?") for file, field, _ in asked
    ]
    assert f"not read: {broken}" in err
    assert [row["error"].startswith(f"{broken}: not an image") for row in (first, second)] == [True, True]
    scores = [anls(row["answer"], [answer]) for row, (*_, answer) in zip(rows, asked, strict=True)]
    assert sum(scores) / len(scores) > 0.5, rows


def test_questions_about_a_page_are_answered_together_as_alone(served, receipts, monkeypatch) -> None:
    page = served.fit_page(Image.open(receipts[0][0]).convert("RGB"))
    assert page.width == 768
    texts = ("What is the total?", "What is the date?")
    prompts = [served.prepare(Prompt(page=page, question=text, max_new_tokens=12)) for text in texts]
    seen, forward = [], type(served.model.vision_tower).forward

    def counted(self, pixel_values):
        seen.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(type(served.model.vision_tower), "forward", counted)
    together = served.answer(prompts)
    assert seen == [prompts[0].encoded.num_tiles]  # the page is encoded once
    alone = [served.answer([prompt])[0] for prompt in prompts]
    assert [(one.text, one.tokens) for one in together] == [(one.text, one.tokens) for one in alone]


def test_the_record_of_the_box_is_that_of_its_weights() -> None:
    assert read_record(weights_folder(BOX))["stage"] == "receipts"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fields", "total", "--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["--fields", "total", "--model", "box:recipts"], "did you mean 'receipts'"),
        (["--fields", " , "], "expected names with commas between them"),
        (["--question", " "], "--question ' ': expected a question"),
        ([], "takes one of --question, --questions, --fields and --prompt, found none"),
        (["--fields", "total", "--question", "What?"], "--prompt, found --question and --fields"),
        (["--fields", "total", "--max-new-tokens", "0"], "--max-new-tokens=0: expected at least 1"),
        (["--fields", "total", "--dpi", "0"], "--dpi=0: expected at least 1"),
        (["--fields", "total", "--pages", "0-2"], "--pages 0-2: '0-2' is no page or span of pages"),
        (["--questions", "nowhere.txt"], "--questions nowhere.txt: cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_read_is_named(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["read", str(tmp_path / "page.png"), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["read", "page.png", "--fields", "total", "--model", str(tmp_path)]) == 1
    assert "has no readable config.json" in capsys.readouterr().err
