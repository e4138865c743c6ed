"""`alignvlm read` on many pages: constant memory, a kill and a resume, the forms of its records, and what fails."""

import csv
import fcntl
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.cli import main
from alignvlm_pl.errors import DataError
from alignvlm_pl.serving import reading
from alignvlm_pl.serving.model import ServedModel
from alignvlm_pl.serving.pages import Document
from alignvlm_pl.serving.reading import Plan, Question, Reading
from alignvlm_pl.serving.records import COLUMNS, Journal, record_key, record_writer
from tests.drills.launch import start_command
from tests.parity.tiny_pages import save
from tests.unit.pdf_files import encrypted_pdf, write_pdf

PAGES = 300
MIB = 1 << 20


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_memory_is_constant_over_300_pages(hf: Path, tmp_path: Path) -> None:
    many = write_pdf(tmp_path / "many.pdf", PAGES, points_per_pixel=10)  # a rendered page has 1.4 MB
    pages, sizes = [], []
    plan = Plan(
        files=[many], questions=[Question(None, "What?")], pages=None, dpi=72, batch_size=4, max_new_tokens=1
    )  # fmt: skip

    def emit(records: list[dict[str, Any]]) -> None:
        pages.extend(record["page"] for record in records)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))

    assert Reading(ServedModel(str(hf), device="cpu"), plan).run(emit, bar=False) == []
    assert pages == list(range(1, PAGES + 1)) and len(sizes) == PAGES / 4
    assert (max(sizes[10:]) - sizes[10]) / MIB < 20, [size // MIB for size in sizes]


@pytest.mark.slow
def test_a_killed_command_is_resumed_without_a_page_twice_or_missing(hf: Path, tmp_path: Path, capsys, caplog) -> None:
    many = write_pdf(tmp_path / "many.pdf", PAGES)
    out, part = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.part"
    late = tmp_path / "late.png"  # a file that is not there before the resume
    words = ["read", str(late), str(many), "--model", str(hf), "--question", "What?", "--question", "Why?"]
    words += ["--dpi", "72", "--max-new-tokens", "2", "--out", str(out)]
    run = start_command(words, tmp_path / "log")
    while not part.is_file() or part.read_bytes().count(b"\n") < 80:
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(20)
    assert not out.exists()
    kept = part.read_bytes().rpartition(b'{"source"')[0]  # its last record is cut
    part.write_bytes(kept + b'{"source": "')
    before = [json.loads(line) for line in kept.splitlines()[1:]]
    assert 78 <= len(before) < 2 * PAGES
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(words) == 1
    assert f"another command is writing into {part}" in capsys.readouterr().err
    assert main([*words, "--dpi", "100"]) == 1
    assert f"{part} holds pages read with --dpi 72, now it is 100; repeat the command" in capsys.readouterr().err
    assert part.read_bytes() == kept + b'{"source": "'
    Image.new("RGB", (60, 80)).save(late)
    assert main([*words, "--batch-size", "5"]) == 0
    read = re.search(r"(\d+) pages in .*, (\d+) were read before", caplog.text)
    found = lines_of(out)
    assert found[: len(before)] == before
    asked = [(str(many), page, question) for page in range(1, PAGES + 1) for question in ("What?", "Why?")]
    new = [(str(late), 1, question) for question in ("What?", "Why?")]
    assert [(one["source"], one["page"], one["question"]) for one in found] == [
        *asked[: len(before)], *new, *asked[len(before) :]
    ]  # fmt: skip
    assert read and int(read[2]) == len(before) // 2 and int(read[1]) == PAGES + 1 - len(before) // 2
    assert list(out.parent.iterdir()) == [out]


def test_records_have_one_form_in_json_lines_and_csv(hf: Path, tmp_path: Path, capfd) -> None:
    pdf = write_pdf(tmp_path / "a.pdf", 3)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "b.png")
    (questions := tmp_path / "q.txt").write_text("What?\n\n Why? \nWhat?\n")
    words = ["read", str(tmp_path / "b.png"), str(pdf), "--model", str(hf), "--questions", str(questions)]
    words += ["--pages", "1", "--max-new-tokens", "3"]
    assert main(words) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(one["source"], one["page"], one["question"]) for one in records] == [
        (source, 1, question) for source in (str(tmp_path / "b.png"), str(pdf)) for question in ("What?", "Why?")
    ]
    model = ServedModel(str(hf)).hash
    for one in records:
        assert tuple(one) == COLUMNS
        assert one["tokens"] == 3 and one["finish_reason"] == "length" and one["seconds"] > 0
        assert (one["model"], one["field"], one["error"]) == (model, None, None)
    assert main([*words, "--out", str(tmp_path / "out.csv")]) == 0  # by its ending
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    same = ("source", "question", "answer", "model")
    assert [[row[name] for name in same] for row in rows] == [[one[name] for name in same] for one in records]
    assert rows[0]["field"] == rows[0]["error"] == ""


def test_markdown_has_a_heading_a_page_and_escapes_its_text() -> None:
    blank = dict.fromkeys(COLUMNS)
    page = {**blank, "source": "a_b.pdf", "page": 2}
    file = io.StringIO()
    write = record_writer(file, "md")
    write({**page, "field": "total", "question": "What is the total?", "answer": "*9*"})
    write({**page, "question": "Why [so]?", "answer": "a\n```\nb"})
    write({**page, "page": 3, "field": "readout", "answer": "text"})
    write({**blank, "source": "c.pdf", "error": "c.pdf: gone"})
    assert file.getvalue() == (
        "## a\\_b.pdf, page 2\n\n**total**: \\*9\\*\n\n**Why \\[so\\]?**\n\n````text\na\n```\nb\n````\n\n"
        "## a\\_b.pdf, page 3\n\ntext\n\n## c.pdf\n\nnot read: c.pdf: gone\n\n"
    )


def test_what_fails_is_recorded_and_listed_and_the_rest_is_read(hf: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pdf(tmp_path / "a.pdf", 3)
    (tmp_path / "e.pdf").write_bytes(encrypted_pdf())
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    monkeypatch.setattr(sys, "stdin", io.StringIO("b.png\ne.pdf\na.pdf\n"))
    words = ["read", "-", "--model", str(hf), "--fields", "date, total", "--max-new-tokens", "2", "--out", "o.jsonl"]
    assert main([*words, "--pages", "3-5,1"]) == 1
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not read: ")]
    beginnings = (
        "b.png has 1 page(s), --pages 3-5,1 asks for page 3; name pages that are there",
        "b.png: not an image that can be read",
        "e.pdf: the PDF is encrypted; give a copy",
        "a.pdf has 3 page(s), --pages 3-5,1 asks for page 4; name pages",
    )
    for message, beginning in zip(messages, beginnings, strict=True):
        assert message.startswith(f"not read: {beginning}")
    found = [(one["source"], one["page"], one["field"], one["error"] is None) for one in lines_of(tmp_path / "o.jsonl")]
    assert found == [
        *[("a.pdf", page, field, True) for page in (1, 3) for field in ("date", "total")],
        ("b.png", 3, None, False),
        *[("b.png", 1, field, False) for field in ("date", "total")],
        ("e.pdf", None, None, False),
        ("a.pdf", 4, None, False),
    ]


def test_questions_about_a_page_are_answered_in_one_batch(hf: Path, tmp_path: Path, monkeypatch) -> None:
    sizes, answer = [], ServedModel.answer
    monkeypatch.setattr(
        ServedModel, "answer", lambda self, prompts: sizes.append(len(prompts)) or answer(self, prompts)
    )
    questions = [Question(None, text) for text in ("a?", "b?", "c?")]
    loads, page = [], Document.page
    monkeypatch.setattr(Document, "page", lambda self, number: loads.append(number) or page(self, number))
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    files, model = [tmp_path / f"{number}.png" for number in (1, 2, 3)], ServedModel(str(hf))
    for size in (7, 2):
        plan = Plan(files=files, questions=questions, pages=None, dpi=72, batch_size=size, max_new_tokens=1)
        assert Reading(model, plan).run(lambda records: None, bar=False) == []
    assert sizes == [6, 3, *[2, 1] * 3]
    assert len(loads) == 6


def test_a_question_or_batch_that_fails_leaves_the_others(
    hf: Path, tmp_path: Path, monkeypatch, caplog, capsys
) -> None:
    prepare, answer, batches = ServedModel.prepare, ServedModel.answer, []

    def prepared(self, prompt):
        if prompt.question == "b?":
            raise DataError("no such question")
        return prepare(self, prompt)

    def answered(self, prompts):
        batches.append(len(prompts))
        if len(batches) == 2:
            raise DataError("no such tile")
        return answer(self, prompts)

    monkeypatch.setattr(ServedModel, "prepare", prepared)
    monkeypatch.setattr(ServedModel, "answer", answered)
    monkeypatch.setattr(reading, "LINE_SECONDS", 0.0)
    caplog.set_level("INFO", "alignvlm_pl")
    path, found = write_pdf(tmp_path / "a.pdf", 3), []
    plan = Plan(
        files=[path], questions=[Question(None, "a?"), Question(None, "b?")], pages=None, dpi=72, batch_size=2,
        max_new_tokens=1,
    )  # fmt: skip
    model = ServedModel(str(hf))
    run = Reading(model, plan)
    messages = run.run(found.extend, bar=False)
    assert batches == [1, 1, 1]
    assert [(one["page"], one["question"]) for one in found] == [(1, "a?"), (3, "a?")]
    assert sorted((one["page"], one["question"]) for one in run.failures) == [
        (1, "b?"),
        (2, "a?"),
        (2, "b?"),
        (3, "b?"),
    ]
    assert f"{path}: page 2: no such question" in messages
    assert f"{path}: page 2, or another of its batch: no such tile" in messages
    assert re.search(r"^2 of 3 pages, [\d.]+ pages/s, ETA \d\d:\d\d$", "\n".join(caplog.messages), re.MULTILINE)
    Reading(model, plan, done={record_key(one) for one in run.failures if one["page"] == 2}).run(found.extend, bar=True)
    assert "3/3" in capsys.readouterr().err


def test_a_last_line_without_its_end_is_no_record(tmp_path: Path) -> None:
    first, second = ({**dict.fromkeys(COLUMNS), "source": "a.pdf", "page": page} for page in (1, 2))
    with Journal(tmp_path / "o.jsonl", {"model": "a"}) as journal:
        journal.append([first, second])
    path = journal.path
    path.write_bytes(path.read_bytes()[:-1])
    with Journal(tmp_path / "o.jsonl", {"model": "a"}) as journal:
        assert journal.done == {record_key(first)}
        journal.append([second])
        journal.finish([], "jsonl")
    assert lines_of(tmp_path / "o.jsonl") == [first, second]


def test_a_file_that_is_no_journal_is_left_alone(hf: Path, tmp_path: Path, capsys) -> None:
    (part := tmp_path / "o.csv.part").write_text("of another program")
    page = write_pdf(tmp_path / "a.pdf", 1)
    assert main(["read", str(page), "--model", str(hf), "--fields", "a", "--out", str(tmp_path / "o.csv")]) == 1
    assert f"{part} is no journal of read" in capsys.readouterr().err
    assert part.read_text() == "of another program"


def test_text_of_p_vocab_is_written_for_a_model_that_has_one(hf: Path, tmp_path: Path, capsys) -> None:
    page = write_pdf(tmp_path / "a.pdf", 2)
    assert main(["read", str(page), "--model", str(hf), "--prompt", "readout", "--dpi", "72"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["page"], one["field"], one["question"]) for one in records] == [(n, "readout", None) for n in (1, 2)]
    assert all(one["answer"] and one["tokens"] for one in records)
    mlp = save(tmp_path, connector={"type": "mlp"})
    assert main(["read", str(page), "--model", str(mlp), "--prompt", "readout", "--out", str(tmp_path / "o.md")]) == 1
    assert not (tmp_path / "o.md.part").exists()
    assert f"error: --model {mlp}: connector 'mlp' has no P_vocab, whose text" in capsys.readouterr().err
    assert main(["read", str(page), "--model", str(mlp), "--prompt", "transcribe", "--max-new-tokens", "2"]) == 0
    asked = [json.loads(line)["question"] for line in capsys.readouterr().out.splitlines()]
    assert asked == ["Transcribe the page."] * 2
