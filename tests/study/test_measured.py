"""What a result file takes from the folders of a run: documents of the questions, order of the samples, time."""

import json

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from alignvlm_pl.study.measured import _order, _seconds, document_names
from datamodules.shards.writer import ShardWriter


def test_questions_about_one_page_are_of_one_document(tmp_path):
    from io import BytesIO

    from PIL import Image

    pages = []
    for colour in ("red", "blue"):
        buffer = BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        pages.append(buffer.getvalue())

    def record(**fields):
        asked = {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
        return {"messages": [asked, answer], "references": ["a"], **fields}

    with ShardWriter(tmp_path / "set", name="q", source="made", license="CC0-1.0") as out:
        out.add(record(), [pages[0]], ["png"])
        out.add(record(), [pages[1]], ["png"])
        out.add(record(), [pages[0]], ["png"])
        out.add(record(meta={"document": "form 7"}), [pages[0]], ["png"])
        text = [{"role": one["role"], "content": one["content"][-1:]} for one in record()["messages"]]
        out.add({**record(), "messages": text}, [], [])
    settings = {"data": {"init_args": {"benchmarks": {"q": {"folder": str(tmp_path / "set")}}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    found = list(document_names(tmp_path)["q"].values())
    assert found[0] == found[2] != found[1]
    assert found[3] == "form 7"
    assert found[4] not in found[:4], "a question without a page is a document of its own"


def test_the_order_is_that_of_the_samples_not_of_the_steps_alone():
    lines = [{"step": step, "rank": 0, "keys": [str(step)]} for step in range(1, 102)]
    found = _order("read", lines)
    assert list(found) == ["read/1", "read/50", "read/100"]
    assert _order("read", lines[:60]) == {key: found[key] for key in ("read/1", "read/50")}
    swapped = [lines[0], {**lines[2], "step": 2}, {**lines[1], "step": 3}, *lines[3:]]
    other = _order("read", swapped)
    assert other["read/1"] == found["read/1"]
    assert other["read/50"] != found["read/50"]


def test_an_interruption_does_not_count_as_time(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, seconds in ((10, 0.0), (20, 5.0), (30, 3605.0), (40, 3610.0), (50, 3615.0)):
            writer.add_scalar("perf/tokens_per_s", 1.0, step, walltime=1000 + seconds)
    assert _seconds(tmp_path, 60) == pytest.approx(30.0)
    with SummaryWriter(str(tmp_path / "short")) as writer:
        writer.add_scalar("perf/tokens_per_s", 1.0, 2)
    assert _seconds(tmp_path / "short", 3) == 0.0


def test_results_are_read_again_where_they_changed(tmp_path):
    from alignvlm_pl.study.plan import Cell, Study
    from alignvlm_pl.study.results import Results

    (tmp_path / "recipe.yaml").write_text("stages: [{}]\n")
    study = Study(
        path=tmp_path / "a.yaml", recipe=tmp_path / "recipe.yaml", arms={"a": {}}, base="a", seeds=[0], budgets=[]
    )
    cell, results = Cell(study=study, arm="a", seed=0, budget="samples"), Results(tmp_path / "results")
    assert results.read(cell) is None
    results.write(cell, {"loss": {"x": 1 / 3}})
    assert results.read(cell)["loss"] == {"x": 0.3333333}
    path = results.path(cell)
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": {"x": 2}}))
    assert results.read(cell)["loss"] == {"x": 2}
