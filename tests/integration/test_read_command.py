"""`alignvlm read` with the model in the box, on synthetic receipts that it never saw."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_pl.cli import main, read
from alignvlm_pl.cli.read import COLUMNS, ask_page
from alignvlm_pl.metrics.anls import anls
from alignvlm_pl.models import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm_pl.models.loading import weights_folder
from alignvlm_pl.preprocessing.images.trim import scale_to_width, trim_page
from alignvlm_pl.training.export import read_record
from datamodules.prepare.synthetic import generate_document
from tests.parity.tiny_pages import make

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
def model() -> AlignVLMForConditionalGeneration:
    return AlignVLMForConditionalGeneration.from_pretrained(BOX).eval()


def test_fields_of_pages_are_read(receipts, tmp_path: Path, capfd) -> None:
    files = [str(file) for file, _ in receipts]
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    options = ["--model", BOX, "--fields", "date, total", "--max-new-tokens", "16"]
    assert main(["read", files[0], str(broken), files[1], *options, "--to", "csv"]) == 1
    out, err = capfd.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert out.splitlines()[0] == ",".join(COLUMNS)
    asked = [(file, field, answers[field]) for file, answers in receipts for field in ("date", "total")]
    assert [(row["source"], row["page"], row["field"]) for row in rows] == [
        (str(file), "1", field) for file, field, _ in asked
    ]
    assert f"not read: {broken}" in err
    scores = [anls(row["answer"], [answer]) for row, (*_, answer) in zip(rows, asked, strict=True)]
    assert sum(scores) / len(scores) > 0.5, rows
    assert main(["read", files[0], *options, "--out", str(tmp_path / "read.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "read.jsonl").read_text().splitlines()]
    assert records == [{**row, "page": 1} for row in rows[:2]]


def test_questions_asked_together_are_answered_as_alone(model, receipts) -> None:
    processor = AlignVLMProcessor.from_pretrained(BOX)
    page = scale_to_width(trim_page(Image.open(receipts[0][0]).convert("RGB"))[0], 768)
    questions = ["What is the total?", "What is the date?"]
    together = ask_page(model, processor, page, questions, max_new_tokens=12)
    alone = [ask_page(model, processor, page, [question], max_new_tokens=12)[0] for question in questions]
    assert together == alone


def test_the_vision_tower_sees_a_page_once_for_all_questions(model, receipts, monkeypatch) -> None:
    processor, seen = AlignVLMProcessor.from_pretrained(BOX), []
    page = scale_to_width(Image.open(receipts[0][0]).convert("RGB"), 768)
    forward = type(model.vision_tower).forward

    def counted(self, pixel_values):
        seen.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(type(model.vision_tower), "forward", counted)
    ask_page(model, processor, page, ["What is the total?"] * 3, max_new_tokens=1)
    alone = processor.encode([{"role": "user", "content": [{"type": "image"}]}], [page], generation=True)
    assert seen == [alone.num_tiles]


def test_the_record_of_the_box_is_that_of_its_weights() -> None:
    assert read_record(weights_folder(BOX))["stage"] == "receipts"


def test_a_folder_without_settings_shows_pages_as_they_are(tmp_path: Path, monkeypatch, capsys) -> None:
    processor, tiny = make(tmp_path)
    for one in (processor, tiny):
        one.save_pretrained(tmp_path / "hf")
    page = Image.new("RGB", (300, 200), "white")
    page.paste("black", (100, 80, 200, 90))
    page.save(tmp_path / "page.png")
    shown = []
    monkeypatch.setattr(
        read, "ask_page", lambda _, __, page, questions, **___: shown.append((page.size, questions)) or ["x"]
    )
    words = ["read", str(tmp_path / "page.png"), "--model", str(tmp_path / "hf"), "--fields", "total"]
    assert main(words) == 0
    assert main([*words, "--page-width", "96"]) == 0
    (whole, questions), ((width, height), _) = shown
    assert whole == (300, 200) and questions == ["What is the total?"]
    assert width == 96 and height < 40  # cut to the bar before it was scaled
    assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == ["x", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fields", "total", "--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["--fields", "total", "--model", "box:recipts"], "did you mean 'receipts'"),
        (["--fields", " , "], "expected names with commas between them"),
        (["--fields", "total", "--max-new-tokens", "0"], "at least 1 token"),
    ],
)
def test_what_cannot_be_read_is_named(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["read", str(tmp_path / "page.png"), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["read", "page.png", "--fields", "total", "--model", str(tmp_path)]) == 1
    assert "has no readable config.json" in capsys.readouterr().err
