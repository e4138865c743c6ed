"""Reports: what they hold, and that nothing from data or models gets through unescaped."""

import re

from PIL import Image

from alignvlm_pl.benchmarks import BENCHMARKS, get_benchmark, plain_benchmark
from alignvlm_pl.metrics.base import EvalSample
from alignvlm_pl.scoring.records import page_path, readout_path
from alignvlm_pl.scoring.report import TABLE_1, percent, write_reports
from alignvlm_pl.scoring.run import score_samples

EVIL = "<img src=x onerror=alert(1)>|`*_[link](javascript:x)\n# heading"


def scored_docvqa():
    rows = [
        EvalSample(key="good", prediction="Lund", references=("Lund",), question="where?"),
        EvalSample(key="half", prediction="abcd", references=("abef",), question=EVIL),
        EvalSample(key="../evil", prediction=EVIL, references=(EVIL + "!", "x"), question="what?"),
    ]
    return score_samples(get_benchmark("docvqa"), rows)


def test_html_escapes_everything(tmp_path):
    images = tmp_path / "predictions" / "images"
    for key in ("good", "half", "../evil"):
        path = page_path(images, "docvqa", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    assert sorted(path.name for path in (images / "docvqa").iterdir()) == [
        "..%2Fevil.png",
        "good.png",
        "half.png",
    ]
    write_reports(tmp_path, {"docvqa": scored_docvqa()}, images=images)
    page = (tmp_path / "report.html").read_text()
    assert "onerror" in page
    assert "<img src=x" not in page
    sources = re.findall(r'<img src="([^"]*)"', page)
    # Worst first; of equal scores in the order of the dataset.
    assert [source.rsplit("/", 1)[1] for source in sources] == ["half.png", "..%252Fevil.png", "good.png"]


def test_reports_show_what_p_vocab_reads_where_it_was_painted(tmp_path):
    images = tmp_path / "predictions" / "images"
    for path in (page_path(images, "docvqa", "good"), page_path(images, "docvqa", "half")):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    Image.new("L", (4, 4)).save(readout_path(images, "docvqa", "half"))
    write_reports(tmp_path, {"docvqa": scored_docvqa()}, images=images)
    html, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    shown = re.findall(r'<img src="([^"]*)"', html)
    assert [source.rsplit("/", 1)[1] for source in shown] == ["half.png", "half.readout.png", "good.png"]
    assert markdown.count("(predictions/images/docvqa/half.readout.png)") == 1
    assert "good.readout.png" not in markdown


def test_both_reports_hold_our_row_the_papers_and_the_disagreements(tmp_path):
    scored = scored_docvqa()
    write_reports(tmp_path, {"mine": scored}, images=tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "AlignVLM-Llama-3.2-3B (printed in the paper)" in text.replace("\\", "")
        assert percent(scored.metrics["anls"]) in text
        assert "anls@due" in text
        assert "3 of 5,349 questions" in text
        assert "ncomplete" in text
        assert "rules disagree: 2" in text
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| half")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 5


def test_a_score_of_one_rule_is_labelled(tmp_path):
    scored = score_samples(get_benchmark("docvqa"), scored_docvqa().samples, rule="due")
    write_reports(tmp_path, {"docvqa": scored}, images=tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "this run, rule due" in text
        assert "<td>this run</td>" not in text
        assert "**this run**" not in text


def test_a_report_names_run_metrics_and_directions_and_marks_only_what_is_incomplete(tmp_path):
    cer = score_samples(plain_benchmark("lines", metrics=("cer",)), scored_docvqa().samples)
    whole = score_samples(get_benchmark("docvqa"), scored_docvqa().samples, expected=3)
    run = {"run": "runs/a_b", "weights": "runs/a/hf", "step": "1,200", "date": "2026-01-02 03:04"}
    write_reports(tmp_path, {"docvqa": whole, "lines": cer}, images=tmp_path, run=run)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<th></th><th>anls ↑</th><th>cer ↓</th>" in page
    assert "| | anls ↑ | cer ↓ |" in text
    for value in ("runs/a_b", "runs/a/hf", "1,200", "2026-01-02 03:04"):
        assert f"<code>{value}</code>" in page
    assert "- run: runs/a\\_b\n- weights: runs/a/hf\n- step: 1,200\n" in text
    assert "ncomplete" not in page.split("</style>")[1] + text
    write_reports(tmp_path, {"docvqa": scored_docvqa()}, images=tmp_path)
    assert "* incomplete" in (tmp_path / "report.html").read_text()


def test_the_average_needs_all_nine_columns_whole(tmp_path):
    one = score_samples(get_benchmark("docvqa"), scored_docvqa().samples, expected=3)
    assert not one.problems
    found = dict.fromkeys(TABLE_1, one)
    write_reports(tmp_path, found, images=tmp_path)
    assert "Mean of the nine columns" not in (tmp_path / "report.md").read_text()
    assert set(TABLE_1) <= set(BENCHMARKS)


def test_the_overview_has_the_columns_of_table_1_in_its_order(tmp_path):
    samples = scored_docvqa().samples
    found = {name: score_samples(get_benchmark(name), samples) for name in ("gqa", "wtq", "docvqa")}
    found["own"] = score_samples(plain_benchmark("own", metrics=("anls",)), samples)
    write_reports(tmp_path, found, images=tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    header, _, metrics, ours, *rest = [line for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["DocVQA", "WTQ", "GQA", "own"]
    assert [cell.strip() for cell in metrics.split("|")[2:-1]] == ["anls ↑", "wtq ↑", "gqa ↑", "anls ↑"]
    assert [cell.strip().endswith("\\*") for cell in ours.split("|")[2:-1]] == [True, True, True, False]
    # Only the two metrics that have the rule have a score under it.
    assert rest[0].startswith("| **this run, rule vlmevalkit-2025-02**")
    assert ["–" in cell for cell in rest[0].split("|")[2:-1]] == [False, True, False, True]
    paper = next(line for line in rest if "Llama-3.2-1B" in line)
    assert [cell.strip() for cell in paper.split("|")[2:-1]] == ["72.42", "28.66", "–", "–"]
