"""DocDownstream: samples of lines with pages in a folder, invalid lines, sizes and parts."""

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm_pl.errors import ConfigError
from datamodules.prepare.docdownstream import DocDownstreamFolder
from datamodules.prepare.sources.source import SourceSample, or_error
from datamodules.shards.sample import SampleError, message_text


def page(number: int) -> str:
    return f"./imgs/DUE_Benchmark/DocVQA/pngs/abcd_{number}.png"


def line(*pages: str, question: str = "Total?", **changes: Any) -> dict[str, Any]:
    return {
        "image": list(pages),
        "messages": [
            {"role": "user", "content": "<|image|>" * len(pages) + question},
            {"role": "assistant", "content": "$1,204.50"},
        ],
        "task_name": "qa_sft",
        "dataset_name": "DocVQA",
    } | changes


def image_file(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (number + 2, 3), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


LINES = [
    line(page(0), question="a"),
    line(page(0), page(2), question="b"),
    line(page(1), question="c", dataset_name="ChartQA"),
    line(page(0), question="d"),
    line(page(3), page(1), page(2), question="e"),
    line(page(2), page(2), question="f"),
    line(question="no page", dataset_name="ChartQA"),
]
BAD: list[Any] = [
    "{",
    "[1]",
    line(page(9)),
    line(page(0), page(9)),
    line(page(0), messages=[{"role": "user", "content": "no mark"}]),
    line(page(4)),
    line(page(4), page(3)),
    line(image={"a": 1}),
    line(page(0), messages=[{"role": "user", "content": "<|image|>?"}, {"role": "assistant", "content": ""}]),
]
REASONS = {
    "bad_json": 2,
    "missing_image": 2,
    "placeholder_count": 1,
    "undecodable_image": 2,
    "bad_row": 1,
    "empty_answer": 1,
}


def write_lines(root: Path, lines: Sequence[Any]) -> Path:
    path = root / "train.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def pages() -> dict[str, bytes]:
    held = {page(number): image_file(number) for number in range(4)}
    return {"./imgs/unused.bin": os.urandom(5000)} | held | {page(4): image_file(4)[:50]}


@pytest.fixture
def images(tmp_path) -> Path:
    for name, data in pages().items():
        path = tmp_path / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "pages"


def read(raw: Any) -> tuple[dict[str, SourceSample], Counter[str]]:
    """Samples by their question, and counts of invalid lines."""
    samples, bad = {}, Counter()
    for row in raw.rows(raw.path):
        item = or_error(raw.sample, row)
        if isinstance(item, SampleError):
            bad[item.reason] += 1
        elif item is not None:
            samples[message_text(item.record["messages"][0])] = item
    return samples, bad


def contents(sample: SourceSample) -> list[bytes]:
    return [image for image, _ in sample.images]


EXPECTED = {"a": [0], "b": [0, 2], "c": [1], "d": [0], "e": [3, 1, 2], "f": [2, 2], "no page": []}


def test_pages_of_a_folder(tmp_path, images):
    samples, bad = read(DocDownstreamFolder(path=write_lines(tmp_path, [*LINES, *BAD]), image_root=images))
    assert {name: contents(sample) for name, sample in samples.items()} == {
        name: [image_file(number) for number in numbers] for name, numbers in EXPECTED.items()
    }
    assert bad == REASONS
    assert samples["c"].record == {
        "id": "train/3",
        "source": "ChartQA",
        "task": "qa_sft",
        "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "$1,204.50"}]},
        ],
    }


def test_pages_may_be_called_images_and_turns_may_be_in_parts(tmp_path, images):
    given = line(page(0), page(1), question="and?")
    given["images"] = given.pop("image")
    first = {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "one"}]}
    answer = {"role": "assistant", "content": "$1"}
    given["messages"] = [first, answer, {"role": "user", "content": "<|image|>two"}, answer]
    samples, bad = read(DocDownstreamFolder(path=write_lines(tmp_path, [given]), image_root=images))
    assert not bad
    sample = samples["one"]
    assert contents(sample) == [image_file(0), image_file(1)]
    parts = [part for turn in sample.record["messages"] for part in turn["content"]]
    assert [part["index"] for part in parts if part["type"] == "image"] == [0, 1]


def test_only_some_datasets(tmp_path, images):
    lines = write_lines(tmp_path, [*LINES, *BAD])
    samples, bad = read(DocDownstreamFolder(path=lines, sources=("ChartQA",), image_root=images))
    assert set(samples) == {"c", "no page"}
    assert bad == {"bad_json": 2}
    with pytest.raises(ConfigError, match=r"has no lines of 'ChartQ'; did you mean 'ChartQA'"):
        DocDownstreamFolder(path=lines, sources=("ChartQ",), image_root=images).num_rows()


def test_unsafe_paths_are_refused(tmp_path, images):
    rows = [line("../train.jsonl"), line("/etc/passwd")]
    assert read(DocDownstreamFolder(path=write_lines(tmp_path, rows), image_root=images))[1] == {"unsafe_path": 2}
